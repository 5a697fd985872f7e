"""Runs Python commands in forks of a process that has imported torch already, which takes seconds.

`tests/fork_client.py` stands for `python` then: it asks for a fork, passes signals on and ends as the fork does.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

SECONDS = 300  # after which a command is killed
LIBRARIES = "torch torch._dynamo torch.distributed.launcher.api numpy PIL.Image absl.flags tensorboardX tqdm".split()
LIBRARIES += "scipy.linalg scipy.sparse.csgraph scipy.stats sklearn.cluster sklearn.metrics safetensors".split()
LIBRARIES += "pytorch_fid.inception torchvision.transforms matplotlib.figure matplotlib.ticker".split()
TEXT = {
    "diffusers": "StableDiffusionPipeline UNet2DConditionModel AutoencoderKL DDPMScheduler DDIMScheduler".split(),
    "transformers": "CLIPTextModel CLIPTokenizer CLIPModel".split(),
    "peft": ["LoraConfig"],
}


def serve(address):
    """Fork for every request; in the fork, return the request."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)  # closed when the tests have ended
    while True:
        (key, _), *_ = selector.select()
        if key.fileobj is sys.stdin:
            sys.exit()
        elif key.fileobj is listener:
            connection, _ = listener.accept()
            message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
            request = json.loads(message)
            import_libraries(with_text=any("text_to_image" in argument for argument in request["argv"]))
            child = os.fork()
            if child == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
            for stream in streams:
                os.close(stream)
            if child == 0:
                return request
            selector.register(connection, selectors.EVENT_READ, child)
            selector.register(os.pidfd_open(child), selectors.EVENT_READ, (child, connection))
        elif isinstance(key.data, int):  # a signal for the fork, or its client is gone
            number = key.fileobj.recv(16)
            os.kill(key.data, int(number or signal.SIGKILL))
            if not number:
                selector.unregister(key.fileobj)
                key.fileobj.close()
        else:  # the fork has ended
            child, connection = key.data
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            selector.unregister(key.fileobj)
            os.close(key.fileobj)
            if connection.fileno() >= 0:
                selector.unregister(connection)
                with contextlib.suppress(OSError), connection:
                    connection.send(str(code).encode())


def import_libraries(with_text):
    for name in LIBRARIES:
        importlib.import_module(name)
    if with_text:
        for name, classes in TEXT.items():
            library = importlib.import_module(name)
            for of_library in classes:  # which are imported when they are asked for
                getattr(library, of_library)
    gc.freeze()  # the collector of a fork would copy the memory that it looks through


def run(argv, module, safe_path, unbuffered, cwd, env):
    """Run a script, or a module by its name, as `python` would."""
    signal.alarm(SECONDS)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=unbuffered)
    own = [] if safe_path else [cwd if module else str(Path(argv[0]).parent)]
    sys.path[:1] = [*own, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    code = 1
    try:
        run(**serve(sys.argv[1]))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # the end of an interpreter looks through all memory, too
