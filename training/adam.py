"""Adam as one fused pass that decides on the device whether it applies, with the state_dict of torch.optim.Adam.

torch.optim.Adam itself loads torch's compiler when it is made, which takes longer than many a small run, and its step
cannot be captured by that compiler.
"""

import torch

SETTINGS = {
    "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False, "foreach": None,
    "capturable": False, "differentiable": False, "fused": True, "decoupled_weight_decay": False,
}  # fmt: skip


class Adam:
    """The moments of a network's parameters.

    Args:
        parameters: of the network, those without a gradient too: a state_dict counts them all.
        lr: learning rate, which may be changed between steps.
    """

    def __init__(self, parameters, lr):
        parameters = list(parameters)
        self.number = len(parameters)
        self.places = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
        self.parameters = [parameters[i] for i in self.places]
        self.exp_avgs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]
        self.lr = lr
        self.settings = dict(SETTINGS)

    @torch.no_grad()
    def step(self, gradients, divisor, not_applied):
        """Adam (Kingma & Ba 2015) with gradients / divisor, or nothing where not_applied is 1; both scalar tensors."""
        torch._foreach_add_(self.steps, [1 - not_applied] * len(self.steps))
        beta1, beta2 = self.settings["betas"]
        torch._fused_adam_(
            self.parameters,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            lr=self.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=self.settings["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=not_applied,
        )

    def move(self, move):
        """Replace the moments by move(moment), such as a copy on another device."""
        self.exp_avgs = [move(moment) for moment in self.exp_avgs]
        self.exp_avg_sqs = [move(moment) for moment in self.exp_avg_sqs]

    def state_dict(self):
        """As torch.optim.Adam writes it."""
        entries = zip(self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True)
        states = [dict(zip(("step", "exp_avg", "exp_avg_sq"), entry, strict=True)) for entry in entries]
        group = {"lr": self.lr, **self.settings, "params": list(range(self.number))}
        return {"state": dict(zip(self.places, states, strict=True)), "param_groups": [group]}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Continue from a `state_dict` of this or of torch.optim.Adam."""
        for place, step, exp_avg, exp_avg_sq in zip(
            self.places, self.steps, self.exp_avgs, self.exp_avg_sqs, strict=True
        ):
            entry = state["state"][place]
            step.copy_(torch.as_tensor(entry["step"]))
            exp_avg.copy_(entry["exp_avg"])
            exp_avg_sq.copy_(entry["exp_avg_sq"])
        group = state["param_groups"][0]
        self.lr = group["lr"]
        self.settings = {name: group.get(name, default) for name, default in SETTINGS.items()}
