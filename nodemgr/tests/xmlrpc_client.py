"""The node manager over XML-RPC: argv are the owner's socket and the services' socket. The caller is pl_conf."""

import http.client
import socket
import sys
import time
import unittest
import xmlrpc.client


class UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over a Unix socket."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def make_connection(self, host):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.path)
        return connection


def proxy(path):
    return xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=UnixTransport(path), allow_none=True)


OWNER, NM = sys.argv.pop(1), sys.argv.pop(1)
POOL = {"cpu_guarantee": 500, "mem_reserve": "1 GiB", "base_rate": "10 Mbit/s"}
WANT = {"vm_type": "test-vm", "cpu_guarantee": 100, "disk_quota": "5 GiB", "keys": ["ssh-ed25519 A me"]}


class Facade(unittest.TestCase):
    def setUp(self):
        self.owner, self.nm = proxy(OWNER), proxy(NM)

    def fault(self, code, *words):
        test = self

        class Expected:
            def __enter__(self):
                return self

            def __exit__(self, kind, fault, _trace):
                test.assertIs(kind, xmlrpc.client.Fault)
                test.assertEqual(fault.faultCode, code, fault.faultString)
                for word in words:
                    test.assertIn(word, fault.faultString)
                return True

        return Expected()

    def test_1_introspection_names_papers_and_shipped_functions(self):
        names = self.nm.system.listMethods()
        self.assertEqual(len(names), len(set(names)))
        papers = {"create_root_pool", "get_rcap", "get_rspec", "split_pool", "bind", "acquire", "release"}
        shipped = {"Help", "Ticket", "AdminTicket", "GetXIDs", "GetSSHKeys", "Create", "Destroy", "Start", "Stop",
                   "ReCreate", "GetEffectiveRSpec", "GetRSpec", "GetLoans", "SetLoans", "GetRecord"}
        self.assertLessEqual(papers | shipped, set(names))
        for name in names:
            self.assertTrue(self.nm.system.methodHelp(name))
            self.assertTrue(self.nm.system.methodSignature(name))
        self.assertEqual(self.nm.system.methodSignature("split_pool"),
                         [["string", "string", "struct"], ["string", "string", "struct", "string"]])
        self.assertIn("Start(sliver_name)", self.nm.Help())

    def test_2_a_sliver_from_a_root_pool(self):
        nm = self.nm
        with self.fault(108, "Permission denied"):
            nm.create_root_pool(POOL, "pl_conf")
        root = self.owner.create_root_pool(POOL, "pl_conf", "boot-1")
        self.assertEqual(self.owner.create_root_pool(POOL, "pl_conf", "boot-1"), root, "the stored answer")
        with self.fault(104, "key_reused"):
            self.owner.create_root_pool({"cpu_guarantee": 1}, "pl_conf", "boot-1")
        self.assertEqual((nm.get_rcap(), nm.get_rcaps()), (root, [root]))
        rcap = nm.split_pool(root, WANT)
        self.assertEqual(nm.get_rspec(root)["cpu_guarantee"], 400)
        vm_id = nm.bind(rcap, "princeton_codeen")
        self.assertIsInstance(vm_id, int)
        self.assertEqual(nm.get_rspec(rcap)["disk_quota"], 5 << 30, "more than 32 bits")

        # The same sliver by the shipped node manager's functions; pl_conf holds its pool.
        self.assertEqual(nm.GetXIDs(), {"princeton_codeen": vm_id})
        self.assertEqual(nm.GetSSHKeys(), {"princeton_codeen": "ssh-ed25519 A me"})
        self.assertEqual(nm.GetRSpec("princeton_codeen")["cpu_guarantee"], 100)
        # Loans: more than it has waits, and what is lent is less of its own.
        self.assertEqual(nm.GetLoans("princeton_codeen"), [])
        other = nm.bind(nm.acquire({"vm_type": "test-vm"}), "princeton_other")
        self.assertEqual(nm.SetLoans("princeton_codeen", [["princeton_other", "cpu_pct", 4]]), 1)
        self.assertEqual(nm.GetLoans("princeton_codeen"), [["princeton_other", "cpu_pct", 4]])
        self.assertEqual(nm.GetRSpec("princeton_codeen")["cpu_guarantee"], 100)
        self.assertEqual(nm.GetEffectiveRSpec("princeton_codeen")["cpu_guarantee"], 60)
        self.assertEqual(nm.GetEffectiveRSpec("princeton_other")["cpu_guarantee"], 40)
        with self.fault(102, "recipient, resource, amount"):
            nm.SetLoans("princeton_codeen", [["princeton_other", "cpu_pct", -4]])
        with self.fault(102, "disk_max"):
            nm.SetLoans("princeton_codeen", [["princeton_other", "disk_max", 4]])
        self.assertEqual(nm.SetLoans("princeton_codeen", []), 1)
        self.assertEqual(nm.Destroy("princeton_other"), 1)
        self.assertNotEqual(other, vm_id)
        self.assertEqual(nm.Stop("princeton_codeen"), 1)
        self.wait_for_state("stopped")
        self.assertEqual(nm.Start("princeton_codeen"), 1)
        self.wait_for_state("reachable")
        self.assertEqual(nm.ReCreate("princeton_codeen"), 1)
        self.assertEqual(nm.destroy(rcap), 1)

    def wait_for_state(self, state):
        end = time.monotonic() + 30
        while True:
            slivers = self.nm.list()["slivers"]
            states = [sliver["state"] for sliver in slivers if sliver["account"] == "princeton_codeen"]
            if states == [state]:
                return
            self.assertLess(time.monotonic(), end, f"{states}, not {state}")
            time.sleep(0.02)

    def test_3_faults_are_those_of_the_shipped_node_manager(self):
        nm = self.nm
        with self.fault(100, "Invalid API method NoSuch.  Valid choices are create_root_pool, "):
            nm.NoSuch()
        with self.fault(101, "Invalid argument count: got 0, expecting 1."):
            nm.Start()
        with self.fault(101, "Invalid argument count: got 5, expecting 2."):
            nm.split_pool(1, 2, 3, 4, 5)
        with self.fault(102, "Invalid argument: the first argument must be a sliver name."):
            nm.Start("princeton_nobody")
        with self.fault(102, "Invalid argument: the first argument must be a sliver name."):
            nm.Start(7)
        with self.fault(102, "argument 2 is string; allowed: struct"):
            nm.split_pool("0" * 32, "everything")
        with self.fault(102, "rcap", "32 hexadecimal digits"):
            nm.get_rspec("beef")
        with self.fault(104, "not_found"):
            nm.get_rspec("0" * 32)
        with self.fault(104, "Only PLC can create non delegated slivers."):
            nm.Create("princeton_nobody")
        with self.fault(102, "cpu_shape"):
            nm.split_pool(nm.get_rcap(), {"cpu_shape": 1})

    def test_4_multicall_keeps_going(self):
        calls = xmlrpc.client.MultiCall(self.nm)
        calls.get_rcap()
        calls.NoSuch()
        calls.get_rcaps()
        results = calls()
        self.assertEqual(results[0], self.nm.get_rcap())
        with self.fault(100):
            results[1]
        self.assertEqual(results[2], [results[0]])
        nested = self.nm.system.multicall([{"methodName": "system.multicall", "params": [[]]}])
        self.assertEqual(nested[0]["faultCode"], 102)


if __name__ == "__main__":
    unittest.main(warnings="ignore")
