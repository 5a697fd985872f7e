"""As `python`, but a script or module runs in a fork of `tests/fork_server.py`, whose socket is FORK_SERVER.

Signals are passed on, and the fork ends with this process. Other commands (-c, -), and those whose
standard streams are closed, go to the interpreter itself.
"""

import json
import os
import signal
import socket
import sys

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main():
    options, argv = set(), sys.argv[1:]
    while argv and argv[0] in ("-P", "-u", "-m"):
        options.add(argv.pop(0))
    streams_are_open = all(os.path.exists(f"/dev/fd/{number}") for number in range(3))  # noqa: PTH110
    if not argv or argv[0].startswith("-") or not streams_are_open:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    request = {"argv": argv, "module": "-m" in options, "env": dict(os.environ)}
    request["cwd"] = os.getcwd()  # noqa: PTH109 - pathlib takes long to import
    request["safe_path"] = "-P" in options or bool(os.environ.get("PYTHONSAFEPATH"))
    request["unbuffered"] = "-u" in options or bool(os.environ.get("PYTHONUNBUFFERED"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ["FORK_SERVER"])
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        for number in CAUGHT:
            signal.signal(number, lambda number, _: server.send(str(number).encode()))
        code = int(server.recv(16))
    if code < 0:  # by a signal
        if -code in CAUGHT:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
