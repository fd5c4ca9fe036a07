#!/usr/bin/env python3
"""Configures and starts a VM on a monitor's control socket: SOCKET KERNEL.

Requests in the order of firecracker-go-sdk, over one connection of Python's own HTTP client.
"""

import http.client
import json
import socket
import sys


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def main():
    connection = Connection(sys.argv[1])

    def call(method, path, body=None, status=204):
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == status, (method, path, answer.status, content)
        return json.loads(content) if content else None

    assert call("GET", "/machine-config", status=200)["mem_size_mib"] == 128
    call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "smt": False})
    call("PUT", "/boot-source", {"kernel_image_path": sys.argv[2], "boot_args": "quiet " * 500})
    fault = call("PUT", "/actions", {"action_type": "InstanceStart"}, status=400)
    assert "command line" in fault["fault_message"], fault
    call("PUT", "/boot-source", {"kernel_image_path": sys.argv[2], "boot_args": "quiet"})
    call("PUT", "/entropy", {})
    assert call("GET", "/", status=200)["state"] == "Not started"
    call("PUT", "/actions", {"action_type": "InstanceStart"})


if __name__ == "__main__":
    main()
