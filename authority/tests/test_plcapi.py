"""PLCAPI as Python's xmlrpc.client speaks it, against a started mandoline-authority.

Run by `cargo test -p mandoline-authority`, or by hand:
    MANDOLINE_AUTHORITY_BIN=target/debug/mandoline-authority python3 authority/tests/test_plcapi.py
With MANDOLINE_TEST_DATABASE=postgres://... the same on that (empty) database.
"""

import hashlib
import hmac
import json
import os
import queue
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
import xmlrpc.client

BIN = os.environ.get("MANDOLINE_AUTHORITY_BIN", "mandoline-authority")
DATABASE = os.environ.get("MANDOLINE_TEST_DATABASE")
ADMIN, PASSWORD = "admin@example.org", "an admin's long password"
PI, USER, OTHER = "pi@example.org", "user@example.org", "other@elsewhere.net"
SECRET = "a user's long password"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


def password(name, secret=SECRET):
    return {"AuthMethod": "password", "Username": name, "AuthString": secret}


class Server:
    def __init__(self, *options):
        self.tmp = tempfile.TemporaryDirectory()
        self.data = os.path.join(self.tmp.name, "data")
        self.options = options
        self.database = ["--database", DATABASE] if DATABASE else []

    def init(self):
        path = os.path.join(self.tmp.name, "password")
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as f:
            f.write(PASSWORD + "\n")
        subprocess.run([BIN, "init", "--data", self.data, "--admin-email", ADMIN, "--admin-password-file", path,
                        *self.database], check=True, stdout=subprocess.DEVNULL)

    def start(self):
        with open(os.path.join(self.tmp.name, "log"), "a") as log:
            self.process = subprocess.Popen(
                [BIN, "serve", "--data", self.data, "--listen", "127.0.0.1:0", *self.database, *self.options],
                stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        self.url = re.fullmatch(r"listening on (http://\S+)\n", line).group(1)
        self.plc = xmlrpc.client.ServerProxy(self.url + "/PLCAPI/", allow_none=True)

    def stop(self, kill=False):
        self.process.kill() if kill else self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()

    def log(self):
        with open(os.path.join(self.tmp.name, "log")) as f:
            return f.read()


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = SERVER
        cls.plc = SERVER.plc
        cls.admin = password(ADMIN, PASSWORD)

    def fault(self, code, text, call, *arguments):
        with self.assertRaises(xmlrpc.client.Fault) as caught:
            call(*arguments)
        self.assertEqual((caught.exception.faultCode, caught.exception.faultString), (code, text))

    def fault_like(self, code, pattern, call, *arguments):
        with self.assertRaises(xmlrpc.client.Fault) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.faultCode, code, caught.exception.faultString)
        self.assertRegex(caught.exception.faultString, pattern)


class Test1Protocol(Case):
    """Introspection, auth structs, and the order of checks."""

    def test_introspection(self):
        names = self.plc.system.listMethods()
        for name in ("AuthCheck", "AddSlice", "GetSlivers", "system.multicall"):
            self.assertIn(name, names)
        self.assertEqual(self.plc.system.methodSignature("AddSliceToNodes"),
                         [["int", "struct", "int or string", "array"]])
        self.assertIn("two weeks", self.plc.system.methodHelp("AddSlice"))

    def test_unknown_method(self):
        self.fault(100, "Invalid method NoSuch", self.plc.NoSuch)
        self.fault(100, "Invalid method NoSuch", self.plc.system.methodHelp, "NoSuch")

    def test_count_comes_before_auth(self):
        self.fault(101, ": AddSlice: Expected 2 arguments, got 1", self.plc.AddSlice, {})
        self.fault(101, ": GetNodes: Expected 1-3 arguments, got 0", self.plc.GetNodes)

    def test_shape_of_the_auth_struct(self):
        methods = "'session', 'password', 'capability', 'gpg', 'hmac', 'hmac_dummybox', 'anonymous'"
        self.fault(102, f": AuthCheck: Invalid AuthMethod value: must be {methods}",
                   self.plc.AuthCheck, {"AuthMethod": "magic"})
        self.fault(102, ": AuthCheck: Invalid auth value: 'AuthMethod' not specified", self.plc.AuthCheck, {})
        self.fault(102, ": AuthCheck: Invalid auth value: expected struct, got int", self.plc.AuthCheck, 1)

    def test_password(self):
        self.assertEqual(self.plc.AuthCheck(self.admin), 1)
        self.assertEqual(self.plc.AuthCheck(password(ADMIN.upper(), PASSWORD)), 1)
        refused = ": AuthCheck: Failed to authenticate call: PasswordAuth: Password verification failed"
        self.fault(103, refused, self.plc.AuthCheck, password(ADMIN, "wrong"))
        self.fault(103, refused, self.plc.AuthCheck, password("nobody@example.org", "wrong"))

    def test_anonymous(self):
        self.fault(103, ": AuthCheck: Failed to authenticate call: AnonymousAuth: method cannot be called anonymously",
                   self.plc.AuthCheck, {"AuthMethod": "anonymous"})
        self.assertIsInstance(self.plc.GetNodes({"AuthMethod": "anonymous"}), list)

    def test_session(self):
        token = self.plc.GetSession(self.admin)
        self.assertRegex(token, r"^[A-Za-z0-9+/]{43}=$")
        auth = {"AuthMethod": "session", "session": token}
        self.assertEqual(self.plc.AuthCheck(auth), 1)
        self.assertEqual(self.plc.GetSession(auth), token)
        self.assertEqual(self.plc.DeleteSession(auth), 1)
        self.fault(103, ": AuthCheck: Failed to authenticate call: SessionAuth: No such session",
                   self.plc.AuthCheck, auth)

    def test_a_session_that_has_ended(self):
        token = self.plc.GetSession(self.admin, 1)
        auth = {"AuthMethod": "session", "session": token}
        deadline = time.monotonic() + 10
        while True:
            try:
                self.plc.AuthCheck(auth)
            except xmlrpc.client.Fault as fault:
                # The sweep may have been there first.
                self.assertRegex(fault.faultString, r"SessionAuth: (Invalid session|No such session)$")
                break
            self.assertLess(time.monotonic(), deadline)

    def test_types_of_arguments(self):
        me = self.plc.GetPersons(self.admin, ADMIN, ["person_id"])[0]["person_id"]
        self.fault(102, f"person_id {me}: AddSlice: Invalid slice_fields value: expected struct, got int",
                   self.plc.AddSlice, self.admin, 1)
        self.fault(102, f"person_id {me}: AddSlice: Invalid slice_fields value: 'name' not specified",
                   self.plc.AddSlice, self.admin, {})
        self.fault(102, f"person_id {me}: AddSlice: Invalid argument: Cannot add Slice with column(s) ['x']",
                   self.plc.AddSlice, self.admin, {"name": "a_b", "x": 1})

    def test_multicall(self):
        calls = xmlrpc.client.MultiCall(self.plc)
        calls.AuthCheck(self.admin)
        calls.NoSuch()
        calls.system.multicall([])
        results = self.plc.system.multicall([
            {"methodName": "AuthCheck", "params": [self.admin]},
            {"methodName": "NoSuch", "params": []},
            {"methodName": "system.multicall", "params": [[]]}])
        self.assertEqual(results[0], [1])
        self.assertEqual(results[1], {"faultCode": 100, "faultString": "Invalid method NoSuch"})
        self.assertEqual(results[2]["faultCode"], -507)
        self.assertEqual(calls()[0], 1)

    def test_guessing_is_stopped_and_secrets_are_not_logged(self):
        for _ in range(10):
            self.fault_like(103, "verification failed", self.plc.AuthCheck, password("victim@example.org", "guess-secret"))
        self.fault_like(103, "too many failed attempts", self.plc.AuthCheck, password("victim@example.org", "guess-secret"))
        self.assertEqual(self.plc.AuthCheck(self.admin), 1)
        self.assertNotIn("guess-secret", self.server.log())
        self.assertNotIn(PASSWORD, self.server.log())

    def test_what_is_no_call_is_not_repeated(self):
        for body in (b"<methodCall>hidden-secret", b"\xff\xfe", b"<a>" * 100_000, b""):
            request = urllib.request.Request(self.server.url + "/PLCAPI/", data=body)
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
            with self.assertRaises(xmlrpc.client.Fault):
                xmlrpc.client.loads(text)
            self.assertNotIn(b"hidden-secret", text)


class Test2Objects(Case):
    """People, sites, nodes; filters and return fields."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        plc, admin = cls.plc, cls.admin
        cls.site = plc.AddSite(admin, {"name": "Example", "login_base": "example", "abbreviated_name": "Ex",
                                       "url": "http://example.org", "is_public": True, "max_slices": 3,
                                       "latitude": 40.35, "longitude": -74.65})
        cls.far = plc.AddSite(admin, {"name": "Elsewhere", "login_base": "elsewhere", "abbreviated_name": "El",
                                      "max_slices": 1})
        cls.people = {}
        for email, roles, site in ((PI, ["pi", "user"], "example"), (USER, [30], cls.site), (OTHER, ["pi"], cls.far)):
            person = plc.AddPerson(admin, {"first_name": "Ünï", "last_name": "Çode", "email": email, "password": SECRET})
            cls.people[email] = person
            plc.AddPersonToSite(admin, person, site)
            for role in roles:
                plc.AddRoleToPerson(admin, role, person)
        cls.nodes = [plc.AddNode(admin, "example", {"hostname": f"node{i}.example.org", "model": f"m{i}"})
                     for i in range(1, 4)]

    def test_1_a_new_person_is_disabled_until_a_pi_enables_it(self):
        self.fault_like(103, "Password verification failed", self.plc.AuthCheck, password(USER))
        self.plc.UpdatePerson(self.admin, PI, {"enabled": True})
        self.plc.UpdatePerson(self.admin, OTHER, {"enabled": True})
        self.fault_like(108, "Permission denied", self.plc.UpdatePerson, password(OTHER), USER, {"enabled": True})
        self.assertEqual(self.plc.UpdatePerson(password(PI), USER, {"enabled": True}), 1)
        self.assertEqual(self.plc.AuthCheck(password(USER)), 1)

    def test_2_roles(self):
        self.fault_like(103, r"^: AddSite: Failed to authenticate call: PasswordAuth: missing role, method AddSite has "
                             r"roles \[admin\] -- caller user@example.org has roles \[user\]$",
                        self.plc.AddSite, password(USER), {"name": "x", "login_base": "x", "abbreviated_name": "x"})
        token = self.plc.GetSession(password(USER))
        auth = {"AuthMethod": "session", "session": token}
        self.fault_like(108, r"^: AddSite: Permission denied: SessionAuth: missing role, ",
                        self.plc.AddSite, auth, {"name": "x", "login_base": "x", "abbreviated_name": "x"})
        self.assertEqual(self.plc.AuthCheck(auth), 1)
        self.fault_like(108, "Not allowed to grant role 'admin'", self.plc.AddRoleToPerson, password(PI), "admin", USER)
        self.fault_like(102, "Invalid role identifier or name", self.plc.AddRoleToPerson, self.admin, "king", USER)

    def test_3_doubles_and_missing(self):
        me = self.plc.GetPersons(self.admin, ADMIN)[0]["person_id"]
        self.fault_like(102, "already exists", self.plc.AddNode, self.admin, "example", {"hostname": "node1.example.org"})
        self.fault_like(102, "already exists", self.plc.AddPerson, self.admin,
                        {"first_name": "a", "last_name": "b", "email": USER})
        self.fault(102, f"person_id {me}: DeleteSlice: Invalid argument: No such slice",
                   self.plc.DeleteSlice, self.admin, "example_none")
        self.fault(102, f"person_id {me}: DeleteNode: Invalid argument: No such node", self.plc.DeleteNode, self.admin, 99999)

    def test_4_keys(self):
        user = password(USER)
        key = self.plc.AddPersonKey(user, USER, {"key_type": "ssh", "key": KEY + " me@home"})
        self.assertEqual(self.plc.GetKeys(user, [key], ["key", "key_type"]),
                         [{"key": KEY + " me@home", "key_type": "ssh"}])
        self.fault_like(102, "Invalid SSH version 2 public key", self.plc.AddPersonKey, user, USER,
                        {"key_type": "ssh", "key": KEY + " x\n" + KEY})
        self.fault_like(108, "Permission denied", self.plc.AddPersonKey, user, PI, {"key_type": "ssh", "key": KEY})
        self.assertEqual(self.plc.GetKeys(password(OTHER), key), [], "others' keys are not shown")
        self.assertEqual(self.plc.DeleteKey(user, key), 1)
        self.plc.AddPersonKey(user, USER, {"key_type": "ssh", "key": KEY + " me@home"})

    def test_5_filters(self):
        plc, admin, nodes = self.plc, self.admin, self.nodes
        names = lambda filter: [n["hostname"] for n in plc.GetNodes(admin, filter, ["hostname"])]
        self.assertEqual(names("node1.example.org"), ["node1.example.org"])
        self.assertEqual(names(nodes[1]), ["node2.example.org"])
        self.assertEqual(names([nodes[0], "node3.example.org"]), ["node1.example.org", "node3.example.org"])
        self.assertEqual(names({"hostname": "NODE2*"}), ["node2.example.org"])
        self.assertEqual(names({"model": ["m1", "m3"]}), ["node1.example.org", "node3.example.org"])
        self.assertEqual(names({"~model": "m1", "-SORT": "-hostname"}), ["node3.example.org", "node2.example.org"])
        self.assertEqual(names({"]node_id": nodes[1]}), ["node2.example.org", "node3.example.org"])
        self.assertEqual(names({"<node_id": nodes[1]}), ["node1.example.org"])
        self.assertEqual(names({"model": "m1", "hostname": "node3*", "-OR": 1}), ["node1.example.org", "node3.example.org"])
        self.assertEqual(names({"-SORT": "hostname", "-OFFSET": 1, "-LIMIT": 1}), ["node2.example.org"])
        self.assertEqual(names({"hostname": []}), [])
        self.assertEqual(names(424242), [])
        self.assertEqual(len(names({"last_contact": None})), 3)
        persons = plc.GetPersons(admin, {"|site_ids": [self.site]}, ["email"])
        self.assertEqual(sorted(p["email"] for p in persons), [PI, USER])
        me = plc.GetPersons(admin, ADMIN)[0]["person_id"]
        self.fault(102, f"person_id {me}: GetNodes: Invalid argument: Invalid filter field 'badfield'",
                   plc.GetNodes, admin, {"badfield": 1})
        self.fault_like(102, r"unknown column\(s\) specified \['x'\] in Node", plc.GetNodes, admin, None, ["x"])

    def test_6_objects_have_planetlabs_fields(self):
        node = self.plc.GetNodes(self.admin, self.nodes[0])[0]
        for field in ("node_id", "node_type", "hostname", "site_id", "boot_state", "run_level", "model", "boot_nonce",
                      "version", "ssh_rsa_key", "date_created", "last_updated", "last_contact", "verified", "key",
                      "session", "interface_ids", "conf_file_ids", "slice_ids", "slice_ids_whitelist", "pcu_ids",
                      "ports", "peer_id", "peer_node_id", "node_tag_ids", "nodegroup_ids"):
            self.assertIn(field, node)
        self.assertEqual((node["node_type"], node["boot_state"], node["verified"]), ("regular", "reinstall", False))
        self.assertRegex(node["key"], r"^[A-Za-z0-9+/]{43}$")
        person = self.plc.GetPersons(self.admin, USER)[0]
        self.assertEqual((person["first_name"], person["roles"], person["role_ids"]), ("Ünï", ["user"], [30]))
        self.assertNotIn("password", person)
        site = self.plc.GetSites(self.admin, "example")[0]
        self.assertEqual((site["latitude"], site["node_ids"], site["max_slices"]), (40.35, self.nodes, 3))

    def test_7_secrets_are_for_admins(self):
        for auth in (password(USER), {"AuthMethod": "anonymous"}):
            node = self.plc.GetNodes(auth, self.nodes[0])[0]
            self.assertFalse({"key", "session", "boot_nonce"} & set(node))
            self.assertEqual(self.plc.GetNodes(auth, self.nodes[0], ["node_id", "key"])[0], {"node_id": self.nodes[0]})
            self.fault_like(102, "Invalid filter field 'key'", self.plc.GetNodes, auth, {"key": "a*"})
        seen = {p["email"] for p in self.plc.GetPersons(password(USER))}
        self.assertEqual(seen, {PI, USER})

    def test_8_what_xml_cannot_hold(self):
        self.plc.UpdatePerson(self.admin, OTHER, {"bio": "a < b & c \u2028 \U0001f34a"})
        self.assertEqual(self.plc.GetPersons(self.admin, OTHER, ["bio"]), [{"bio": "a < b & c \u2028 \U0001f34a"}])


class Test3Slices(Case):
    """The way of a slice, to what its node is told."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.pi, cls.user = password(PI), password(USER)
        cls.nodes = [n["node_id"] for n in cls.plc.GetNodes(cls.admin, {"-SORT": "hostname"}, ["node_id", "hostname"])]

    def test_1_add(self):
        plc, pi = self.plc, self.pi
        who = f"person_id {plc.GetPersons(pi, PI)[0]['person_id']}"
        for name in ("Example_x", "example", "example_", "_x", "example_a b", "exa-mple_x", ""):
            self.fault_like(102, f"^{who}: AddSlice: Invalid", plc.AddSlice, pi, {"name": name})
        self.fault_like(102, "Invalid slice prefix nowhere in nowhere_x", plc.AddSlice, pi, {"name": "nowhere_x"})
        self.fault_like(108, f"^{who}: AddSlice: Permission denied", plc.AddSlice, pi, {"name": "elsewhere_x"})
        self.fault_like(103, "missing role", plc.AddSlice, self.user, {"name": "example_x"})
        slice_id = plc.AddSlice(pi, {"name": "example_one", "url": "http://x.org", "description": "first", "cpu_share": 7})
        self.fault_like(102, "already exists", plc.AddSlice, pi, {"name": "example_one"})
        got = plc.GetSlices(pi, "example_one")[0]
        self.assertEqual(got["slice_id"], slice_id)
        self.assertEqual((got["instantiation"], got["max_nodes"], got["node_ids"]), ("plc-instantiated", 100, []))
        self.assertAlmostEqual(got["expires"] - got["created"], 14 * 86400, delta=5)
        self.assertEqual(plc.GetSlices(pi, "example_one", ["name", "cpu_share", "mem_limit"]),
                         [{"name": "example_one", "cpu_share": "7", "mem_limit": None}])
        self.assertEqual([s["name"] for s in plc.GetSlices(pi, {"cpu_share": "7"}, ["name"])], ["example_one"])

    def test_2_the_number_of_slices_is_bounded(self):
        plc = self.plc
        plc.AddSlice(self.pi, {"name": "example_two"})
        plc.AddSlice(self.pi, {"name": "example_three"})
        self.fault_like(102, r"Site example has reached \(3\) its maximum allowable slice count \(3\)",
                        plc.AddSlice, self.pi, {"name": "example_four"})
        plc.DeleteSlice(self.pi, "example_three")
        plc.DeleteSlice(self.pi, "example_two")

    def test_3_users(self):
        plc, name = self.plc, "example_one"
        self.fault_like(108, "Permission denied", plc.UpdateSlice, self.user, name, {"url": "http://y.org"})
        self.fault_like(108, "Permission denied", plc.AddPersonToSlice, password(OTHER), OTHER, name)
        self.assertEqual(plc.AddPersonToSlice(self.pi, USER, name), 1)
        self.assertEqual(plc.AddPersonToSlice(self.pi, USER, name), 1)
        self.assertEqual(plc.UpdateSlice(self.user, name, {"url": "http://y.org"}), 1)
        self.fault_like(108, "max_nodes", plc.UpdateSlice, self.user, name, {"max_nodes": 5})

    def test_4_renewal(self):
        plc, name = self.plc, "example_one"
        me = plc.GetPersons(self.user, USER)[0]["person_id"]
        self.fault(102, f"person_id {me}: UpdateSlice: Invalid argument: '1970-01-01 00:00:01' not in the future",
                   plc.UpdateSlice, self.user, name, {"expires": 1})
        week = 7 * 86400
        self.fault_like(102, "eight weeks", plc.UpdateSlice, self.user, name, {"expires": int(time.time()) + 9 * week})
        self.fault_like(102, "empty description or URL", plc.UpdateSlice, self.user, name,
                        {"expires": int(time.time()) + 4 * week, "url": ""})
        expires = int(time.time()) + 4 * week
        self.assertEqual(plc.UpdateSlice(self.user, name, {"expires": expires}), 1)
        self.assertEqual(plc.GetSlices(self.user, name, ["expires"]), [{"expires": expires}])

    def test_5_tags(self):
        plc, name = self.plc, "example_one"
        self.fault_like(102, "No such tag type 'no_such'", plc.AddSliceTag, self.user, name, "no_such", "1")
        self.fault_like(102, "cpu_guarantee", plc.AddSliceTag, self.admin, name, "cpu_guarantee", "5000")
        self.fault_like(108, "takes the role pi", plc.AddSliceTag, self.user, name, "mem_limit", "128 MiB")
        tag = plc.AddSliceTag(self.pi, name, "mem_limit", "128 MiB")
        self.fault_like(102, "Slice attribute already exists", plc.AddSliceTag, self.pi, name, "mem_limit", "64 MiB")
        got = plc.GetSliceTags(self.user, tag)[0]
        self.assertEqual((got["name"], got["tagname"], got["value"], got["node_id"]), (name, "mem_limit", "128 MiB", None))
        self.assertEqual(plc.AddSliceTag(self.user, name, "initscript", "#!/bin/sh\necho <hi>\n") > tag, True)

    def test_6_nodes(self):
        plc, name = self.plc, "example_one"
        self.fault_like(102, "No such node: nowhere.example.org", plc.AddSliceToNodes, self.user, name,
                        ["node1.example.org", "nowhere.example.org"])
        self.assertEqual(plc.GetSlices(self.user, name, ["node_ids"]), [{"node_ids": []}], "all or nothing")
        self.assertEqual(plc.AddSliceToNodes(self.user, name, ["node1.example.org", self.nodes[1]]), 1)
        self.assertEqual(plc.AddSliceToNodes(self.user, name, ["node1.example.org"]), 1)
        self.assertEqual(plc.GetSlices(self.user, name, ["node_ids"]), [{"node_ids": self.nodes[:2]}])
        self.assertEqual(plc.DeleteSliceFromNodes(self.user, name, [self.nodes[1]]), 1)
        self.fault_like(108, "Not allowed", plc.AddSliceToNodes, password(OTHER), name, [self.nodes[1]])
        plc.AddSliceTag(self.pi, name, "cpu_share", "9", "node1.example.org")

    def test_7_get_slivers(self):
        plc = self.plc
        got = plc.GetSlivers(self.admin, "node1.example.org")
        self.assertEqual(set(got), {"timestamp", "node_id", "hostname", "interfaces", "groups", "conf_files", "initscripts",
                                    "slivers", "accounts", "xmpp", "hrn", "reservation_policy", "leases",
                                    "lease_granularity"})
        self.assertAlmostEqual(got["timestamp"], time.time(), delta=30)
        self.assertEqual((got["node_id"], got["hostname"]), (self.nodes[0], "node1.example.org"))
        self.assertEqual((got["reservation_policy"], got["leases"], got["lease_granularity"]), ("none", None, 3600))
        sliver, = got["slivers"]
        self.assertEqual(set(sliver), {"name", "slice_id", "instantiation", "expires", "keys", "attributes",
                                       "GetSliceFamily"})
        self.assertEqual(sliver["keys"], [{"key_type": "ssh", "key": KEY + " me@home"}])
        attributes = {(a["tagname"], a["value"]) for a in sliver["attributes"]}
        self.assertIn(("mem_limit", "128 MiB"), attributes)
        self.assertIn(("cpu_share", "9"), attributes, "the sliver's")
        self.assertNotIn(("cpu_share", "7"), attributes, "hidden by the sliver's")
        self.assertEqual([a["name"] for a in got["accounts"]], ["site_admin", "root"])
        self.assertEqual(plc.GetSlivers(self.admin, "node2.example.org")["slivers"], [])
        self.fault_like(103, "missing role", plc.GetSlivers, self.user, "node1.example.org")
        # A disabled person's keys are gone, from one answer to the next.
        plc.UpdatePerson(self.admin, USER, {"enabled": False})
        self.assertEqual(plc.GetSlivers(self.admin, "node1.example.org")["slivers"][0]["keys"], [])
        plc.UpdatePerson(self.admin, USER, {"enabled": True})

    def hmac(self, method, args, node=0, key=None, stamp=None, nonce=None):
        key = key or self.plc.GetNodes(self.admin, self.nodes[node], ["key"])[0]["key"]
        stamp, nonce = stamp or int(time.time()), nonce or secrets.token_hex(16)
        body = json.dumps(args, sort_keys=True, separators=(",", ":")).encode()
        text = f"PLCAPI\n{method}\n{stamp}\n{nonce}\n{hashlib.sha256(body).hexdigest()}"
        value = hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
        return {"AuthMethod": "hmac", "node_id": self.nodes[node], "value": value, "timestamp": stamp, "nonce": nonce}

    def test_8_a_node_calls_for_itself(self):
        plc = self.plc
        auth = self.hmac("GetSlivers", [])
        self.assertEqual(plc.GetSlivers(auth)["hostname"], "node1.example.org")
        self.fault_like(103, "made before", plc.GetSlivers, auth)
        self.fault_like(103, "could not be authenticated", plc.GetSlivers, self.hmac("GetSlivers", [], key="x" * 43))
        self.fault_like(103, "could not be authenticated", plc.AuthCheck, self.hmac("GetSlivers", []))
        self.fault_like(103, "s apart are allowed", plc.GetSlivers, self.hmac("GetSlivers", [], stamp=int(time.time()) - 4000))
        self.fault_like(108, "own slivers only", plc.GetSlivers, self.hmac("GetSlivers", ["node2.example.org"]),
                        "node2.example.org")
        old = dict(self.hmac("GetSlivers", []))
        del old["timestamp"]
        self.fault_like(103, "HMAC-SHA1 is off", plc.GetSlivers, old)
        session = {"AuthMethod": "session", "session": plc.GetSession(self.hmac("GetSession", []))}
        self.assertEqual(plc.GetSlivers(session)["node_id"], self.nodes[0])
        again = {"AuthMethod": "session", "session": plc.GetSession(self.hmac("GetSession", []))}
        self.fault_like(103, "No such session", plc.GetSlivers, session)
        self.assertEqual(plc.AuthCheck(again), 1)
        self.assertTrue(plc.GetNodes(self.admin, self.nodes[0], ["last_contact"])[0]["last_contact"])

    def test_9_deleted_and_made_again_is_another_slice(self):
        plc = self.plc
        first = plc.GetSlices(self.admin, "example_one", ["slice_id"])[0]["slice_id"]
        self.assertEqual(plc.DeleteSlice(self.user, "example_one"), 1)
        self.assertEqual(plc.GetSlices(self.admin, "example_one"), [])
        self.assertEqual(plc.GetSlivers(self.admin, "node1.example.org")["slivers"], [])
        second = plc.AddSlice(self.pi, {"name": "example_one"})
        self.assertNotEqual(first, second)
        self.assertEqual(plc.GetSlices(self.admin, second, ["node_ids", "person_ids"]), [{"node_ids": [], "person_ids": []}])


class Test4Rest(Case):
    """REST over the same things (the node side has its tests in Rust)."""

    def call(self, method, path, body=None, token=None):
        request = urllib.request.Request(self.server.url + path, method=method,
                                         data=None if body is None else json.dumps(body).encode())
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def token(self, email, secret=SECRET):
        status, session = self.call("POST", "/v1/sessions", {"email": email, "password": secret})
        self.assertEqual(status, 201, session)
        return session["token"]

    def test_errors_have_their_kinds(self):
        for method, path, body, status, kind in (
                ("GET", "/v1/slices", None, 401, "unauthenticated"),
                ("POST", "/v1/sessions", {"email": ADMIN, "password": "nope"}, 401, "unauthenticated"),
                ("POST", "/v1/sessions", {"email": ADMIN}, 400, "invalid_argument"),
                ("POST", "/v1/sessions", {"email": ADMIN, "password": "x", "y": 1}, 400, "invalid_argument"),
                ("GET", "/nowhere", None, 404, "not_found"),
                ("PUT", "/v1/slices", None, 405, "invalid_argument"),
                ("POST", "/v1/node/register", {}, 401, "unauthenticated"),
                ("POST", "/v1/sessions", {"email": "x" * (17 << 20), "password": "x"}, 413, "too_large")):
            if status == 413:
                # The server may hang up before it has read all; either way nothing is taken in.
                try:
                    got, error = self.call(method, path, body)
                except (urllib.error.URLError, ConnectionError):
                    continue
            else:
                got, error = self.call(method, path, body)
            self.assertEqual((got, error["error"]["kind"]), (status, kind), path)

    def test_a_slice_whole_or_not_at_all(self):
        token = self.token(PI)
        slice = {"name": "example_rest", "url": "http://x.org", "description": "rest", "nodes": ["node1.example.org"],
                 "rspec": {"mem_limit": "64 MiB", "burst_rate": "2 Mbit/s", "x-note": {"a": 1}}}
        status, error = self.call("POST", "/v1/slices", dict(slice, nodes=["gone.example.org"]), token)
        self.assertEqual((status, error["error"]["kind"]), (404, "not_found"))
        status, error = self.call("POST", "/v1/slices", dict(slice, rspec={"cpu_share": -1}), token)
        self.assertEqual((status, error["error"]["attribute"]), (400, "cpu_share"))
        self.assertIn("1000", error["error"]["allowed"])
        self.assertEqual(self.call("GET", "/v1/slices/example_rest", token=token)[0], 404)
        status, made = self.call("POST", "/v1/slices", slice, token)
        self.assertEqual(status, 201, made)
        self.assertEqual(made["persons"], [PI])
        self.assertEqual(made["rspec"], {"burst_rate": 2000000, "mem_limit": 64 << 20, "x-note": {"a": 1}})
        status, error = self.call("PATCH", "/v1/slices/example_rest", {"rspec": {"ports": ["tcp/8080"]}}, token)
        self.assertEqual((status, error["error"]["kind"]), (403, "forbidden"), "ports are the admins' to give")
        status, changed = self.call("PATCH", "/v1/slices/example_rest", {"rspec": {"ports": ["tcp/8080"]}},
                                    self.token(ADMIN, PASSWORD))
        self.assertEqual((status, changed["rspec"]), (200, {"ports": ["tcp/8080"]}))
        status, slivers = self.call("GET", "/v1/slices/example_rest/slivers", token=token)
        self.assertEqual([(s["hostname"], s["state"], s["vm_type"]) for s in slivers],
                         [("node1.example.org", "pending", "kvm-microvm")])
        status, changed = self.call("PATCH", "/v1/slices/example_rest", {"rspec": {"mem_limit": 67108864}, "enabled": False},
                                    self.token(ADMIN, PASSWORD))
        self.assertEqual((status, changed["rspec"], changed["enabled"]), (200, {"mem_limit": 67108864}, False))
        stranger = self.token(OTHER)
        self.assertEqual(self.call("GET", "/v1/slices/example_rest", token=stranger)[0], 404)
        self.assertEqual(self.call("DELETE", "/v1/slices/example_rest", token=stranger)[0], 404)
        self.assertNotIn("example_rest", [s["name"] for s in self.call("GET", "/v1/slices", token=stranger)[1]])
        status, less = self.call("DELETE", "/v1/slices/example_rest/nodes", {"hostnames": ["node1.example.org"]}, token)
        self.assertEqual((status, less["nodes"]), (200, []))
        self.assertEqual(self.call("DELETE", "/v1/slices/example_rest", token=token), (204, None))

    def test_events_reach_those_who_may_see_them(self):
        def read(answer, lines):
            try:
                for line in answer:
                    lines.put(line.decode())
            except (OSError, AttributeError, ValueError):
                pass  # closed under us at the end of the test

        streams = {}
        for email in (PI, OTHER):
            request = urllib.request.Request(self.server.url + "/v1/events")
            request.add_header("Authorization", f"Bearer {self.token(email)}")
            answer = urllib.request.urlopen(request, timeout=30)
            self.addCleanup(answer.close)
            lines = queue.Queue()
            threading.Thread(target=read, args=(answer, lines), daemon=True).start()
            streams[email] = lines

        def event(lines, kind):
            while True:
                line = lines.get(timeout=20)
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    if event["kind"] == kind:
                        return event

        self.plc.AddSlice(password(PI), {"name": "example_seen"})
        self.assertEqual(event(streams[PI], "slice_added")["slice"], "example_seen")
        # A stranger's stream goes from what it may see to what it may see.
        self.plc.AddSlice(password(OTHER), {"name": "elsewhere_own"})
        self.assertEqual(event(streams[OTHER], "slice_added")["slice"], "elsewhere_own")
        self.plc.DeleteSlice(password(PI), "example_seen")
        self.plc.DeleteSlice(password(OTHER), "elsewhere_own")

    def test_openapi(self):
        status, served = self.call("GET", "/v1/openapi.json")
        printed = json.loads(subprocess.run([BIN, "openapi"], check=True, capture_output=True).stdout)
        self.assertEqual((status, served), (200, printed))


class Test5Program(Case):
    """Starting, stopping, dying."""

    def fails(self, *arguments):
        got = subprocess.run([BIN, *arguments], capture_output=True, text=True, timeout=60)
        self.assertNotEqual(got.returncode, 0)
        return got.stderr

    def test_errors_say_what_to_do(self):
        server = self.server
        tmp = server.tmp.name
        missing = os.path.join(tmp, "missing")
        if not DATABASE:
            self.assertIn("init --data", self.fails("serve", "--data", missing))
            self.assertIn("another mandoline-authority runs", self.fails("serve", "--data", server.data, "--listen", "127.0.0.1:0"))
        self.assertIn("not a loopback address", self.fails("serve", "--data", server.data, "--listen", "0.0.0.0:0"))
        weak = os.path.join(tmp, "weak")
        with open(os.open(weak, os.O_CREAT | os.O_WRONLY, 0o644), "w") as f:
            f.write(PASSWORD)
        os.chmod(weak, 0o644)
        text = self.fails("init", "--data", missing, "--admin-email", ADMIN, "--admin-password-file", weak)
        self.assertIn("chmod 600", text)
        self.assertFalse(os.path.exists(missing), "nothing half-made")
        self.assertIn("already", self.fails("init", "--data", server.data, "--admin-email", ADMIN, "--admin-password-file",
                                            os.path.join(tmp, "password"), *server.database))

    @unittest.skipIf(DATABASE, "needs a database of its own")
    def test_a_port_in_use(self):
        other = Server()
        self.addCleanup(other.tmp.cleanup)
        other.init()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.assertIn("is in use", self.fails("serve", "--data", other.data, "--listen", f"127.0.0.1:{port}"))

    def test_z_what_was_answered_survives_being_killed(self):
        name = self.plc.AddSlice(password(PI), {"name": "example_durable"})
        self.server.stop(kill=True)
        self.server.start()
        Case.plc = self.server.plc
        self.assertEqual(self.server.plc.GetSlices(self.admin, "example_durable", ["slice_id"]), [{"slice_id": name}])


class Test6Compat(Case):
    """What only old nodes and scripts need, behind switches."""

    @classmethod
    def setUpClass(cls):
        SERVER.stop()
        SERVER.options = ("--compat-hmac-sha1", "--compat-skip-unknown")
        SERVER.start()
        super().setUpClass()

    def test_hmac_sha1(self):
        node = self.plc.GetNodes(self.admin, "node1.example.org", ["node_id", "key"])[0]
        value = hmac.new(node["key"].encode(), b"[]", hashlib.sha1).hexdigest()
        auth = {"AuthMethod": "hmac", "node_id": node["node_id"], "value": value}
        self.assertEqual(self.plc.GetSlivers(auth)["hostname"], "node1.example.org")
        self.fault_like(103, "could not be authenticated", self.plc.GetSlivers, auth, "node1.example.org")

    def test_unknown_nodes_are_skipped(self):
        self.assertEqual(self.plc.AddSliceToNodes(self.admin, "example_durable",
                                                  ["nowhere.example.org", "node1.example.org"]), 1)
        self.assertEqual(len(self.plc.GetSlices(self.admin, "example_durable", ["node_ids"])[0]["node_ids"]), 1)


SERVER = None


def setUpModule():
    global SERVER
    SERVER = Server()
    SERVER.init()
    SERVER.start()


def tearDownModule():
    SERVER.stop()
    SERVER.tmp.cleanup()


if __name__ == "__main__":
    unittest.main()
