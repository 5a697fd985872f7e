"""Runs scripts in forks of a process that has imported torch already, which takes seconds: see `tests.commands`.

A request is a line of JSON on standard input; the answer is the exit code, a line on standard output.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

SECONDS = 300  # after which a script is killed
LIBRARIES = "torch torch._dynamo torch.distributed numpy scipy.linalg PIL.Image".split()
LIBRARIES += "absl.flags tensorboardX tqdm safetensors".split()
TEXT = {
    "diffusers": "StableDiffusionPipeline UNet2DConditionModel AutoencoderKL DDPMScheduler DDIMScheduler".split(),
    "transformers": "CLIPTextModel CLIPTokenizer CLIPModel".split(),
}


def serve():
    """Answer requests until there are no more; in a child process, return its request."""
    for line in sys.stdin:
        request = json.loads(line)
        for name in LIBRARIES:
            importlib.import_module(name)
        if request["text"]:
            for name, classes in TEXT.items():
                library = importlib.import_module(name)
                for of_library in classes:  # which are imported when they are asked for
                    getattr(library, of_library)
        gc.freeze()  # the collector of a child would copy the memory that it looks through
        child = os.fork()
        if child == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def run(argv, module, cwd, path, stdout, stderr, **_):
    """Run a script, or a module by its name, as `python` would; `path` is what PYTHONPATH adds."""
    for descriptor, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    signal.alarm(SECONDS)
    os.chdir(cwd)
    sys.argv = argv
    if module:
        sys.path[:1] = [cwd, *path]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    code = 1
    try:
        run(**serve())
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # the end of an interpreter looks through all memory, too
