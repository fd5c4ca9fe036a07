"""Starts a whole Mandoline from its programs alone: an authority on loopback and a lab with one node.

Only public interfaces are used: command lines, PLCAPI, files that the programs document. The directories
come from the environment that scripts/with-images sets.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request

PANIC = "panicked; its console"  # what mandoline-lab says of a node
PR_SET_PDEATHSIG = 1

ADMIN = "admin@example.org"
PASSWORD = "correct horse battery staple"


def program(name):
    return os.path.join(os.environ["MANDOLINE_BIN"], name)


def run(*argv, check=True, **kwargs):
    """Runs a program to its end; its output is text."""
    done = subprocess.run(argv, text=True, capture_output=True, **kwargs)
    if check and done.returncode != 0:
        raise AssertionError(f"{argv} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Process:
    """A program in the background, its output in a log, ended by pid when the test ends."""

    def __init__(self, log, *argv, **kwargs):
        self.log = log
        self.out = open(log, "wb")
        self.popen = subprocess.Popen(argv, stderr=self.out, stdin=subprocess.DEVNULL,
                                      preexec_fn=die_with_parent, stdout=kwargs.pop("stdout", self.out), **kwargs)

    def stop(self):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(30)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        self.out.close()

    def tail(self, lines=80):
        with open(self.log, errors="replace") as f:
            return "".join(f.readlines()[-lines:])


class Authority:
    """`mandoline-authority` with a fresh database and one administrator."""

    def __init__(self, directory):
        self.data = os.path.join(directory, "authority")
        secret = os.path.join(directory, "admin-password")
        with open(os.open(secret, os.O_CREAT | os.O_WRONLY, 0o600), "w") as f:
            f.write(PASSWORD)
        run(program("mandoline-authority"), "init", "--data", self.data,
            "--admin-email", ADMIN, "--admin-password-file", secret)
        self.port = free_port()
        self.log = os.path.join(directory, "authority.log")
        self.start()

    def start(self):
        self.process = Process(self.log, program("mandoline-authority"), "serve",
                               "--data", self.data, "--listen", f"127.0.0.1:{self.port}")
        wait_for("the authority to listen", lambda: can_connect(self.port), 30, self.process)

    def stop(self):
        self.process.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def rest(self, method, path, body=None, token=None):
        request = urllib.request.Request(self.url + path, method=method,
                                         data=None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")


class Lab:
    """`mandoline-lab up` with one node; `self.node` is the line that it printed for it."""

    last_words = ""

    def __init__(self, directory, config_dir, *arguments):
        self.log = os.path.join(directory, "lab.log")
        self.process = Process(self.log, program("mandoline-lab"), "up", "--json", "--config-dir", config_dir,
                               *arguments, stdout=subprocess.PIPE)
        lines = queue.Queue()

        def read():
            for line in self.process.popen.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            line = lines.get(timeout=180)
        except queue.Empty:
            line = None
        if line is None:
            self.process.stop()
            raise AssertionError(f"the lab node did not come up\n{self.process.tail()}")
        self.node = json.loads(line)

    def exec(self, command, check=True):
        """Runs a shell command on the node as root."""
        return run(program("mandoline-lab"), "exec", self.node["dir"], "--", "sh", "-c", command, check=check)

    def stop(self):
        self.process.stop()
        self.last_words = self.process.tail(200)


def main(case, labs):
    """Runs the tests of `case`. An emulated node whose kernel panicked (QEMU before 8.1 can break code that the
    node's kernel patches; see the lab's `start_all`) proves nothing about them: then, and only then, once more."""
    for attempt in (1, 2, 3):
        result = unittest.TextTestRunner(verbosity=2, failfast=True).run(
            unittest.defaultTestLoader.loadTestsFromTestCase(case))
        if result.wasSuccessful() or not (labs and PANIC in labs[-1].last_words):
            break
        print(f"the node's kernel panicked in attempt {attempt}; its console is above", file=sys.stderr)
    passed = result.testsRun - len(result.failures) - len(result.errors)
    print(f"\n{passed} passed, {len(result.failures) + len(result.errors)} failed")
    sys.exit(0 if result.wasSuccessful() else 1)


def can_connect(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for(what, true, seconds, process=None):
    """Waits until `true()` gives something, and gives that."""
    deadline = time.monotonic() + seconds
    while True:
        got = true()
        if got:
            return got
        if process is not None and process.popen.poll() is not None:
            raise AssertionError(f"waiting for {what}: the program ended\n{process.tail()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}\n{process.tail() if process else ''}")
        time.sleep(0.1)


def temporary_directory():
    return tempfile.TemporaryDirectory(prefix="mandoline-e2e-")
