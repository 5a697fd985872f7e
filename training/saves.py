"""Which checkpoints of a run stay: every milestone, and the newest few of the others."""

from training import checkpoint


class Saves:
    """Checkpoints in one directory.

    Args:
        directory: where they are.
        keep: how many of those that are no milestones stay.
        rolling: names of those that are no milestones, oldest first, as the last checkpoint's "rolling" has them.
    """

    def __init__(self, directory, keep, rolling):
        self.directory = directory
        self.keep = keep
        self.rolling = list(rolling)

    def save(self, name, state, milestone):
        """Write a checkpoint, then remove the oldest that is too many; returns its path."""
        path = self.directory / name
        self.rolling = [other for other in self.rolling if other != name] + ([] if milestone else [name])
        checkpoint.save(path, {**state, "rolling": self.rolling[-self.keep :]})
        for old in self.rolling[: -self.keep]:
            (self.directory / old).unlink(missing_ok=True)
        self.rolling = self.rolling[-self.keep :]
        return path
