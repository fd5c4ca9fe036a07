"""First light: a slice made over PLCAPI becomes a sliver that its user logs in to, and whose limits hold.

Everything is driven by Python's xmlrpc.client, as PlanetLab's own tools did it.
"""

import json
import os
import subprocess
import unittest
import xmlrpc.client

from harness import ADMIN, PASSWORD, Authority, Lab, main, program, run, temporary_directory, wait_for

HOST = "node1.example.org"
SLICE = "example_light"
USER = "user@example.org"
USER_PASSWORD = "another long password"
MIB = 1 << 20
LABS = []


class FirstLight(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tmp = temporary_directory()
        cls.addClassCleanup(cls.tmp.cleanup)
        cls.authority = Authority(cls.tmp.name)
        cls.addClassCleanup(cls.authority.stop)
        cls.plc = xmlrpc.client.ServerProxy(cls.authority.url + "/PLCAPI/", allow_none=True)
        cls.admin = {"AuthMethod": "password", "Username": ADMIN, "AuthString": PASSWORD}
        cls.user = {"AuthMethod": "password", "Username": USER, "AuthString": USER_PASSWORD}

        cls.key = os.path.join(cls.tmp.name, "id_ed25519")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", cls.key)
        cls.make_people_and_node()

        config = os.path.join(cls.tmp.name, "node1")
        os.mkdir(config)
        node = cls.plc.GetNodes(cls.admin, HOST, ["node_id", "key"])[0]
        with open(os.path.join(config, "pl_node.txt"), "w") as f:
            f.write(f'NODE_ID="{node["node_id"]}"\nNODE_KEY="{node["key"]}"\nHOST_NAME="{HOST}"\n'
                    'IP_METHOD="dhcp"\nSERVICES="nodemgr scs"\n')
        with open(os.path.join(config, "owner.json"), "w") as f:
            json.dump([{"slice": "pl_conf", "rspec": {
                "cpu_share": 1000, "mem_limit": "1 GiB", "disk_quota": "5 GB", "base_rate": "10 Mbit/s",
                "burst_rate": "100 Mbit/s", "vcpus": 1}}], f)
        cls.lab = Lab(cls.tmp.name, config, "--authority", f"127.0.0.1:{cls.authority.port}")
        LABS.append(cls.lab)
        cls.addClassCleanup(cls.lab.stop)

    @classmethod
    def make_people_and_node(cls):
        plc, admin = cls.plc, cls.admin
        assert plc.AuthCheck(admin) == 1
        plc.AddSite(admin, {"name": "Example", "login_base": "example", "abbreviated_name": "Ex",
                            "url": "http://example.org", "is_public": True, "max_slices": 10})
        person = plc.AddPerson(admin, {"first_name": "U", "last_name": "Ser", "email": USER, "password": USER_PASSWORD})
        plc.UpdatePerson(admin, person, {"enabled": True})
        plc.AddRoleToPerson(admin, "user", person)
        plc.AddPersonToSite(admin, person, "example")
        with open(cls.key + ".pub") as f:
            plc.AddPersonKey(admin, person, {"key_type": "ssh", "key": f.read().strip()})
        plc.AddNode(admin, "example", {"hostname": HOST})

    def test_1_the_node_registers_and_says_what_it_can_run(self):
        def announced():
            nodes = self.authority.rest("GET", "/v1/nodes", token=self.token(ADMIN, PASSWORD))[1]
            return [n for n in nodes if n["registered"] and n["vm_types"]]

        nodes = wait_for("the node to register", announced, 60, self.lab.process)
        self.assertIn("kvm-microvm", [t["name"] for t in nodes[0]["vm_types"]])

    def test_2_what_cannot_run_is_refused_with_what_could(self):
        plc, admin = self.plc, self.admin
        with self.assertRaises(xmlrpc.client.Fault) as fault:
            plc.AddSlice(admin, {"name": "Example_UPPER", "url": "http://x.org", "description": "bad name"})
        self.assertEqual(fault.exception.faultCode, 102)
        plc.AddSlice(admin, {"name": "example_wrongtype", "url": "http://x.org", "description": "refused"})
        plc.AddSliceTag(admin, "example_wrongtype", "vm_type", "xen-domain")
        with self.assertRaises(xmlrpc.client.Fault) as fault:
            plc.AddSliceToNodes(admin, "example_wrongtype", [HOST])
        self.assertEqual(fault.exception.faultCode, 102)
        for word in ("vm_type", "xen-domain", HOST, "kvm-microvm"):
            self.assertIn(word, fault.exception.faultString)
        plc.DeleteSlice(admin, "example_wrongtype")

    def test_3_a_slice_over_plcapi_becomes_a_sliver_with_limits(self):
        plc, admin = self.plc, self.admin
        plc.AddSlice(admin, {"name": SLICE, "url": "http://example.org/light", "description": "first light"})
        for name, value in (("vm_type", "kvm-microvm"), ("mem_limit", "128 MiB"), ("cpu_share", "20"),
                            ("burst_rate", "8 Mbit/s")):
            plc.AddSliceTag(admin, SLICE, name, value)
        plc.AddPersonToSlice(admin, USER, SLICE)
        self.assertEqual(plc.AddSliceToNodes(admin, SLICE, [HOST]), 1)

        node = plc.GetNodes(admin, HOST, ["node_id"])[0]["node_id"]
        wanted = plc.GetSlivers(admin, node)
        self.assertIn(SLICE, [s["name"] for s in wanted["slivers"]])

        sliver = self.wait_reachable()
        self.assertEqual(sliver["vm_type"], "kvm-microvm")
        self.assertTrue(sliver["ssh_host_keys"], "the sliver's host keys came up")

        # Logged in as its user, over the node's sshd, with host keys checked at both.
        got = self.ssh("uname -r; cat /etc/debian_version; hostname; nproc")
        self.assertEqual(got.returncode, 0, got.stderr)
        kernel, debian, hostname, cpus = got.stdout.split()
        self.assertRegex(kernel, r"^6\.12\.")
        self.assertRegex(debian, r"^\d+(\.\d+)?$")
        self.assertEqual(cpus, "1")
        self.assertTrue(hostname)
        self.assertEqual(self.ssh("exit 7").returncode, 7)
        # It has its own disk, and apt's database is writable there.
        self.assertEqual(self.ssh("touch /var/lib/mark && sync && cat /var/lib/mark").returncode, 0)

        # The limits, read back from the node's kernel.
        cgroup = f"/sys/fs/cgroup/mandoline/slivers/best-effort/{sliver['vm_id']}"
        memory = int(self.lab.exec(f"cat {cgroup}/memory.max").stdout)
        self.assertGreaterEqual(memory, 128 * MIB)
        self.assertLess(memory, 192 * MIB)
        weight = int(self.lab.exec(f"cat {cgroup}/cpu.weight").stdout)
        self.assertGreater(weight, 1)
        classes = self.lab.exec("for d in $(ls /sys/class/net); do tc class show dev $d; done").stdout
        self.assertRegex(classes, r"ceil 8Mbit")
        quota = self.ssh("df --output=size -B1 / | tail -n1")
        self.assertLess(int(quota.stdout), 5 * 10**9)

    def test_4_a_sliver_outlives_its_node_manager(self):
        before = self.ssh("cat /proc/sys/kernel/random/boot_id").stdout
        self.lab.exec("kill -9 $(pidof mandoline-nodemgr)")
        wait_for("the node manager to come back",
                 lambda: self.lab.exec("curl -sf --unix-socket /run/mandoline/nm.sock http://nm/v1/node", check=False)
                 .returncode == 0, 30)
        self.assertEqual(self.ssh("cat /proc/sys/kernel/random/boot_id").stdout, before, "the same boot")
        self.assertEqual(self.wait_reachable()["state"], "reachable")

    def test_5_a_sliver_that_powers_off_is_stopped_and_says_so(self):
        self.ssh("poweroff")
        token = self.token(USER, USER_PASSWORD)

        def stopped():
            slivers = self.authority.rest("GET", f"/v1/slices/{SLICE}/slivers", token=token)[1]
            return [s for s in slivers if s["state"] == "stopped"]

        self.assertIn("shut down", wait_for("the sliver to stop", stopped, 60, self.lab.process)[0]["reason"])

    def test_6_a_deleted_slice_leaves_nothing_on_its_node(self):
        sliver = self.authority.rest("GET", f"/v1/slices/{SLICE}/slivers", token=self.token(USER, USER_PASSWORD))[1][0]
        self.plc.DeleteSlice(self.admin, SLICE)
        gone = f"test ! -e /sys/fs/cgroup/mandoline/slivers/best-effort/{sliver['vm_id']}"
        wait_for("the sliver to go", lambda: self.lab.exec(gone, check=False).returncode == 0, 60, self.lab.process)
        left = self.lab.exec("pidof mandoline-vmm; ls /sys/class/net | grep ^mtap; ls /var/lib/mandoline/slivers", check=False)
        self.assertEqual(left.stdout.strip(), "", "no process, tap or disk is left")

    # -- helpers ---------------------------------------------------------------------------------

    def token(self, email, password):
        status, session = self.authority.rest("POST", "/v1/sessions", {"email": email, "password": password})
        self.assertLess(status, 300, session)
        return session["token"]

    def wait_reachable(self):
        token = self.token(USER, USER_PASSWORD)

        def reachable():
            status, slivers = self.authority.rest("GET", f"/v1/slices/{SLICE}/slivers", token=token)
            self.assertEqual(status, 200, slivers)
            failed = [s for s in slivers if s["state"] == "failed"]
            self.assertFalse(failed)
            return [s for s in slivers if s["state"] == "reachable"]

        return wait_for("the sliver to be reachable", reachable, 120, self.lab.process)[0]

    def ssh(self, command):
        env = dict(os.environ, MANDOLINE_AUTHORITY=self.authority.url, MANDOLINE_TOKEN=self.token(USER, USER_PASSWORD))
        return subprocess.run([program("mandoline"), "ssh", "-i", self.key, SLICE, HOST, "--", command],
                              text=True, capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=120)


if __name__ == "__main__":
    main(FirstLight, LABS)
