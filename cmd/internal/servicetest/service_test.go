package servicetest

import (
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// begin starts the service, which is up when systemctl returns.
func (m *machine) begin() {
	m.t.Helper()
	m.systemctl("start", "viasocks")
	if !m.reaches(far4) {
		m.t.Fatal("the service has started, and the far end cannot be reached through it")
	}
}

// The sandbox of the unit is in force, and everything that viasocks needs works in it.
func TestSandbox(t *testing.T) {
	m := newMachine(t, "log-file /var/log/viasocks/log", "log-level debug", "control-group viasocks",
		"metrics unix:/run/viasocks/metrics", "dns-pool-file /run/viasocks/names")
	// Without src_valid_mark, which viasocks has to set below /proc/sys, this loses the answers of the proxy.
	const valid, strict = "/proc/sys/net/ipv4/conf/all/src_valid_mark", "/proc/sys/net/ipv4/conf/all/rp_filter"
	m.must("/bin/sh", "-c", "echo 1 >"+strict)
	m.begin()
	pid := m.property("viasocks", "MainPID")
	status := m.must("/bin/cat", "/proc/"+pid+"/status")
	const netAdmin, netRaw, chown = 1 << 12, 1 << 13, 1 << 0
	for field, want := range map[string]string{
		"CapEff": "0000000000003001", "CapBnd": "0000000000003001", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := regexp.MustCompile(`(?m)^` + field + `:\s*(\w+)$`).FindStringSubmatch(status); got == nil || got[1] != want {
			t.Errorf("%s is %q; want %s (%#x)", field, got, want, netAdmin|netRaw|chown)
		}
	}
	if _, err := m.run("/usr/bin/nsenter", "--target="+pid, "--mount", "/bin/sh", "-c", "echo x >/etc/viasocks/x"); err == nil {
		t.Error("the service can write to /etc")
	}
	if s := strings.TrimSpace(m.must("/bin/cat", valid)); s != "1" {
		t.Errorf("src_valid_mark is %s", s)
	}
	if !m.reaches(farName) {
		t.Error("a name cannot be reached")
	}
	m.must("/usr/local/bin/viasocks", "health")
	if s := m.must("/usr/local/bin/viasocks", "status"); !strings.Contains(s, ": ready") {
		t.Errorf("the status is\n%s", s)
	}
	if s := m.must("/usr/bin/stat", "-c", "%G %a", "/run/viasocks/metrics", "/var/log/viasocks/log"); !strings.HasPrefix(s,
		"root 6") {
		t.Errorf("the metrics and the log are %s", s)
	}
	// For members of the group, who are not root.
	m.must("/usr/bin/setpriv", "--reuid=65534", "--regid=viasocks", "--clear-groups", "/usr/local/bin/viasocks", "flows")
	if s := m.must("/usr/bin/curl", "-s", "--unix-socket", "/run/viasocks/metrics", "http://x/metrics"); !strings.Contains(s,
		"viasocks_") {
		t.Errorf("the metrics are\n%.300s", s)
	}
	m.noLeak()

	m.systemctl("stop", "viasocks")
	if s := m.changes(); s != "" {
		t.Errorf("after the stop there is still\n%s", s)
	}
	if s := strings.TrimSpace(m.must("/bin/cat", valid)); s != "0" {
		t.Errorf("src_valid_mark is %s after the stop", s)
	}
	log := m.must("/bin/cat", "/var/log/viasocks/log", "/run/viasocks.log")
	if denied := regexp.MustCompile(`(?i).*(not permitted|permission denied|read-only file).*`).FindString(log); denied != "" {
		t.Errorf("the sandbox denies something: %s", denied)
	}
	if !m.reaches(far4) || m.leaks() == "0" {
		t.Error("after the stop, the machine does not reach the far end directly")
	}
}

// A crash, a hang and a reload: nothing leaves without the proxy.
func TestCrashHangReload(t *testing.T) {
	m := newMachine(t)
	m.dropIn("viasocks", "WatchdogSec=2s")
	m.begin()
	// From here on something always tries to leave.
	m.must("/usr/bin/systemd-run", "--unit=trier", "/bin/sh", "-c", "while sleep 0.05; do curl -s -m 1 http://"+far4+"/; done")
	device := m.must("/bin/sh", "-c", "ip -o link show viasocks0 | cut -d: -f1")

	// A Go program that panics ends as with SIGABRT.
	for _, signal := range []string{"SIGKILL", "SIGSTOP", "SIGABRT"} {
		before := m.property("viasocks", "MainPID")
		m.systemctl("kill", "--kill-who=main", "--signal="+signal, "viasocks")
		testkit.Eventually(t, "the service to start again after "+signal, func() bool {
			now := m.property("viasocks", "MainPID")
			return now != "0" && now != before && m.property("viasocks", "ActiveState") == "active"
		})
		testkit.Eventually(t, "the far end after "+signal, func() bool { return m.reaches(far4) })
		m.noLeak()
	}
	if s := m.must("/bin/sh", "-c", "ip -o link show viasocks0 | cut -d: -f1"); s != device {
		t.Errorf("the new process made another device: %s, not %s", s, device)
	}
	if n, _ := strconv.Atoi(m.property("viasocks", "NRestarts")); n != 3 {
		t.Errorf("%d restarts", n)
	}

	m.configure("viasocks", "rule dst 203.0.113.0/24 reject")
	m.systemctl("reload", "viasocks")
	testkit.Eventually(t, "the new rule", func() bool { return !m.reaches(far4) })
	m.configure("viasocks")
	m.systemctl("reload", "viasocks")
	testkit.Eventually(t, "the rule to be gone", func() bool { return m.reaches(far4) })
	m.noLeak()
	m.systemctl("stop", "viasocks")
	testkit.Eventually(t, "the direct way", func() bool { return m.leaks() != "0" })
}

// A mistake in the configuration is not tried again and again.
func TestMistake(t *testing.T) {
	m := newMachine(t, "no-such-option")
	if out, err := m.run("/usr/bin/systemctl", "start", "viasocks"); err == nil {
		t.Fatalf("it started: %s", out)
	}
	if s := m.property("viasocks", "ActiveState"); s != "failed" {
		t.Errorf("the service is %s", s)
	}
	if s := m.property("viasocks", "ExecMainStatus"); s != "2" {
		t.Errorf("its exit status is %s", s)
	}
	if s := m.changes(); s != "" {
		t.Errorf("it changed the machine:\n%s", s)
	}
}

// The machine is closed from the boot on, and stays closed until viasocks is up.
func TestClosed(t *testing.T) {
	m := newMachine(t)
	if !m.reaches(far4) {
		t.Fatal("the far end cannot be reached directly")
	}
	before := m.leaks()
	m.systemctl("start", "viasocks-closed")
	if m.reaches(far4) {
		t.Error("the machine is not closed")
	}
	m.begin()
	m.systemctl("kill", "--kill-who=main", "--signal=SIGKILL", "viasocks")
	testkit.Eventually(t, "the far end", func() bool { return m.reaches(far4) })
	if s := m.leaks(); s != before {
		t.Errorf("packets left: %s before, %s now", before, s)
	}
	m.systemctl("stop", "viasocks-closed", "viasocks")
	m.must("/usr/local/bin/viasocks", "down")
	if s := m.changes(); s != "" {
		t.Errorf("after 'viasocks down' there is still\n%s", s)
	}
}

// The instances have configurations of their own, and one unit at a time is up.
func TestInstance(t *testing.T) {
	m := newMachine(t)
	m.configure("work", "rule proto tcp port 25 reject")
	m.systemctl("start", "viasocks@work")
	if !m.reaches(far4) {
		t.Error("the far end cannot be reached")
	}
	if s := m.must("/usr/local/bin/viasocks", "status"); !strings.Contains(s, "/etc/viasocks/work.conf") {
		t.Errorf("the status is\n%s", s)
	}
	m.noLeak()
	m.systemctl("start", "viasocks")
	if s := m.property("viasocks@work", "ActiveState"); s != "inactive" {
		t.Errorf("the other unit is %s", s)
	}
	if !m.reaches(far4) {
		t.Error("the far end cannot be reached after the change")
	}
	m.systemctl("stop", "viasocks")
	if s := m.changes(); s != "" {
		t.Errorf("after the stop there is still\n%s", s)
	}
}

// Programs are named if the unit has two more capabilities, as its comment says.
func TestProgramNames(t *testing.T) {
	m := newMachine(t)
	m.dropIn("viasocks", "CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH")
	m.begin()
	m.must("/usr/bin/systemd-run", "--unit=slow", "--uid=65534", "/usr/bin/curl", "-s", "http://"+far4+"/slow")
	testkit.Eventually(t, "the program of the flow", func() bool {
		out, _ := m.run("/usr/local/bin/viasocks", "flows")
		return strings.Contains(out, "curl")
	})
	m.systemctl("stop", "slow", "viasocks")
}
