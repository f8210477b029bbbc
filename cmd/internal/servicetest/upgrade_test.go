package servicetest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

const program = "/usr/local/bin/viasocks"

// heldConns is how many connections are open while the service is upgraded.
const heldConns = 50

// hold opens connections to the far end and keeps them in use.
func (m *machine) hold(unit string) {
	m.t.Helper()
	script, err := os.ReadFile("../../../packaging/hold.py")
	if err != nil {
		m.t.Fatal(err)
	}
	m.write("/run/hold.py", string(script))
	m.must("/usr/bin/systemd-run", "--unit="+unit, "/usr/bin/python3", "/run/hold.py", far4, "7", fmt.Sprint(heldConns),
		"/run/"+unit)
	testkit.Eventually(m.t, "the connections to be open", func() bool { open, _, _ := m.held(unit); return open == heldConns })
}

// held returns how many connections of hold are open, how many were lost, and the round trips so far.
func (m *machine) held(unit string) (open, lost, trips int) {
	out, _ := m.run("/bin/cat", "/run/"+unit)
	fmt.Sscan(out, &open, &lost, &trips)
	return open, lost, trips
}

// allHeld checks that no connection was lost and that they still carry.
func (m *machine) allHeld(unit, when string) {
	m.t.Helper()
	_, _, before := m.held(unit)
	testkit.Eventually(m.t, "round trips "+when, func() bool {
		_, lost, now := m.held(unit)
		return lost > 0 || now > before+2*heldConns
	})
	if open, lost, _ := m.held(unit); open != heldConns || lost != 0 {
		m.t.Errorf("%s: %d connections are open, and %d were lost", when, open, lost)
	}
}

// tries makes something that always tries to leave.
func (m *machine) tries() {
	m.t.Helper()
	m.must("/usr/bin/systemd-run", "--unit=trier", "/bin/sh", "-c", "while sleep 0.05; do curl -s -m 1 http://"+far4+"/; done")
}

// upgrade runs `viasocks upgrade`, and returns the process ids of the old and the new process.
func (m *machine) upgrade(unit string) (before, after string) {
	m.t.Helper()
	before = m.property(unit, "MainPID")
	out := m.must(program, "upgrade")
	testkit.Eventually(m.t, "the new process to be the main one", func() bool {
		after = m.property(unit, "MainPID")
		return after != before
	})
	if !strings.HasPrefix(out, "process "+after+" ") {
		m.t.Errorf("the main process is %s: %s", after, out)
	}
	return before, after
}

// alive reports whether a process of the machine runs.
func (m *machine) alive(pid string) bool {
	_, err := m.run("/bin/kill", "-0", pid)
	return err == nil
}

// restarts returns how often systemd has started the unit again.
func (m *machine) restarts(unit string) int {
	n, _ := strconv.Atoi(m.property(unit, "NRestarts"))
	return n
}

// log returns what the service has said.
func (m *machine) log() string {
	out, _ := m.run("/bin/cat", "/run/viasocks.log")
	return out
}

// The service is upgraded while it carries connections: none is lost, nothing leaves without the proxy, and systemd sees one
// service that goes on. Watchdog, reload and stop then work with the new process.
func TestUpgrade(t *testing.T) {
	for _, unit := range []string{"viasocks", "viasocks@work"} {
		t.Run(unit, func(t *testing.T) {
			m := newMachine(t)
			m.configure("work")
			m.dropIn("viasocks@work", "StandardOutput=append:/run/viasocks.log", "StandardError=append:/run/viasocks.log")
			m.dropIn(unit, "WatchdogSec=3s")
			m.systemctl("start", unit)
			m.tries()
			m.hold("held")
			first, second := m.upgrade(unit)
			m.allHeld("held", "after the upgrade")
			m.carriesOn(unit, first, second)
			m.reloads(unit)
			// Again, by the signal, while the first one still carries.
			m.systemctl("kill", "--kill-whom=main", "-s", "USR2", unit)
			var third string
			testkit.Eventually(t, "the third process", func() bool {
				third = m.property(unit, "MainPID")
				return third != second && strings.Count(m.log(), "handed the host over") == 2
			})
			m.allHeld("held", "after the second upgrade")
			m.carriesOn(unit, second, third)
			m.noLeak()
			m.systemctl("stop", unit)
			for _, pid := range []string{first, second, third} {
				if m.alive(pid) {
					t.Errorf("process %s is alive after the stop", pid)
				}
			}
			if s := m.property(unit, "ActiveState") + " " + m.property(unit, "Result"); s != "inactive success" {
				t.Errorf("the service is %s", s)
			}
			if s := m.changes(); s != "" {
				t.Errorf("after the stop there is still\n%s", s)
			}
		})
	}
}

// carriesOn checks that two times of the watchdog later both processes are alive, and the service was not started again.
func (m *machine) carriesOn(unit, before, after string) {
	m.t.Helper()
	m.must("/bin/sleep", "7") // the watchdog has 3 s
	if !m.alive(before) || m.property(unit, "MainPID") != after || m.restarts(unit) != 0 ||
		m.property(unit, "ActiveState") != "active" {
		m.t.Errorf("the service is %s with process %s, started again %d times; the processes were %s and %s",
			m.property(unit, "ActiveState"), m.property(unit, "MainPID"), m.restarts(unit), before, after)
	}
	if s := m.property(unit, "StatusText"); !strings.HasPrefix(s, "carries the host") {
		m.t.Errorf("systemd was told %q", s)
	}
	if s := m.must(program, "status"); !strings.Contains(s, ": ready") {
		m.t.Errorf("the status is\n%s", s)
	}
}

// reloads checks that the new process reads its configuration again.
func (m *machine) reloads(unit string) {
	m.t.Helper()
	name := strings.TrimPrefix(unit, "viasocks@")
	m.configure(name, "rule dst 203.0.113.0/24 port 80 reject")
	m.systemctl("reload", unit)
	testkit.Eventually(m.t, "the new rule", func() bool { return !m.reaches(far4) })
	m.configure(name)
	m.systemctl("reload", unit)
	testkit.Eventually(m.t, "the rule to be gone", func() bool { return m.reaches(far4) })
}

// A new program that cannot start leaves the service as it was, and the log says why.
func TestUpgradeFails(t *testing.T) {
	m := newMachine(t)
	m.begin()
	m.tries()
	m.hold("held")
	pid := m.property("viasocks", "MainPID")
	m.must("/bin/mv", program, program+".good")
	for _, c := range []struct{ what, script, want string }{
		{"not executable", "printf x >$0; chmod 600 $0", "permission denied"},
		{"no program", "printf 'ELF' >$0; chmod 755 $0", "exec format error"},
		{"a crash", "printf '#!/bin/sh\nkill -SEGV $$\n' >$0; chmod 755 $0", "has ended without taking over"},
		{"a wrong configuration", "cp $0.good $0; echo no-such-option >>/etc/viasocks/viasocks.conf", "no-such-option"},
	} {
		m.must("/bin/sh", "-ec", "rm -f $0; "+c.script, program)
		if out, err := m.run(program+".good", "upgrade"); err == nil {
			t.Errorf("%s: %s", c.what, out)
		}
		testkit.Eventually(t, "the log to tell of "+c.what, func() bool { return strings.Contains(m.log(), c.want) })
		if now := m.property("viasocks", "MainPID"); now != pid || m.property("viasocks", "ActiveState") != "active" {
			t.Errorf("%s: the main process was %s and is %s", c.what, pid, now)
		}
	}
	m.allHeld("held", "after upgrades that failed")
	m.configure("viasocks")
	m.upgrade("viasocks")
	m.allHeld("held", "after one that did not")
	m.noLeak()
	m.systemctl("stop", "viasocks")
	if s := m.changes(); s != "" {
		t.Errorf("after the stop there is still\n%s", s)
	}
}

// The new main process is killed while the old one still carries: both end, the host stays closed, and the service comes back.
// If the old one is killed, only its connections are lost.
func TestUpgradeCrash(t *testing.T) {
	m := newMachine(t)
	m.begin()
	m.tries()
	m.hold("held")
	first, second := m.upgrade("viasocks")
	m.must("/bin/kill", "-KILL", first)
	m.must("/bin/sleep", "2")
	if now := m.property("viasocks", "MainPID"); now != second || m.restarts("viasocks") != 0 || !m.reaches(far4) {
		t.Errorf("after the end of the old process the main one is %s, not %s", now, second)
	}
	m.systemctl("stop", "held")
	m.hold("heldagain")
	second, third := m.upgrade("viasocks")
	m.must("/bin/kill", "-KILL", third)
	var fourth string
	testkit.Eventually(t, "the service to start again", func() bool {
		fourth = m.property("viasocks", "MainPID")
		return fourth != third && fourth != "0" && m.property("viasocks", "ActiveState") == "active" &&
			m.restarts("viasocks") == 1
	})
	testkit.Eventually(t, "the far end", func() bool { return m.reaches(far4) })
	if m.alive(second) {
		t.Error("the old process is alive")
	}
	m.noLeak()
	// It can be upgraded once more, and a restart ends it in order.
	m.systemctl("stop", "heldagain")
	m.hold("heldthen")
	m.upgrade("viasocks")
	m.allHeld("heldthen", "after the crash and an upgrade")
	m.noLeak()
	m.systemctl("restart", "viasocks")
	if !m.reaches(far4) {
		t.Error("after a restart the far end cannot be reached")
	}
	m.systemctl("stop", "viasocks", "trier")
	if s := m.changes(); s != "" {
		t.Errorf("after the stop there is still\n%s", s)
	}
}

// What the packages run after an upgrade cuts no connection. Where the new version cannot take over, the service is killed and
// comes back, and where it does not take the configuration, the old one stays.
func TestUpgradePackage(t *testing.T) {
	m := newMachine(t)
	m.must("/bin/cp", program, "/usr/bin/viasocks")
	script, err := os.ReadFile("../../../packaging/scripts/postinstall.sh")
	if err != nil {
		t.Fatal(err)
	}
	m.write("/run/postinstall.sh", string(script))
	install := func(want string) {
		t.Helper()
		if out := m.must("/bin/sh", "/run/postinstall.sh", "configure", "0.1.0"); !strings.Contains(out, want) {
			t.Errorf("it says\n%s\nand not %q", out, want)
		}
	}
	m.begin()
	m.tries()
	m.hold("held")
	first := m.property("viasocks", "MainPID")
	install("viasocks.service goes on with the new version, and no connection was cut")
	second := m.property("viasocks", "MainPID")
	if second == first {
		t.Error("the new version has not taken over")
	}
	m.allHeld("held", "after the upgrade of the package")

	m.configure("viasocks", "no-such-option")
	install("goes on with the version before")
	if now := m.property("viasocks", "MainPID"); now != second {
		t.Errorf("the main process was %s and is %s", second, now)
	}
	m.allHeld("held", "after a version that does not take the configuration")

	m.configure("viasocks", "mtu 1400")
	install("viasocks.service is restarted")
	testkit.Eventually(t, "the service to come back", func() bool {
		now := m.property("viasocks", "MainPID")
		return now != second && now != "0" && m.property("viasocks", "ActiveState") == "active" && m.reaches(far4)
	})
	m.noLeak()
	m.systemctl("stop", "viasocks")
	if s := m.changes(); s != "" {
		t.Errorf("after the stop there is still\n%s", s)
	}
}
