package servicetest

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// worst are the exposures that 'systemd-analyze security' of systemd 252 gives the units: 0 is the best, 10 the worst.
// What is left is what they are for: root's rights over the network, of all addresses, the device TUN, and the control
// groups that 'viasocks exclude' makes.
var worst = map[string]float64{"viasocks.service": 3.0, "viasocks@work.service": 3.0, "viasocks-closed.service": 2.5}

// systemd finds no mistake in the units, and knows each of their options.
func TestUnitsAreValid(t *testing.T) {
	m := newMachine(t)
	for unit, most := range worst {
		// It prints what it does not know, and succeeds.
		out := m.must("/usr/bin/systemd-analyze", "verify", "--man=no", unit)
		for line := range strings.Lines(out) {
			if strings.Contains(line, "viasocks") {
				t.Errorf("%s: %s", unit, line)
			}
		}
		out = m.must("/usr/bin/systemd-analyze", "security", "--offline=true", unit)
		found := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
		if found == nil {
			t.Fatalf("%s: there is no exposure in\n%s", unit, out)
		}
		if got, _ := strconv.ParseFloat(found[1], 64); got > most {
			t.Errorf("%s has the exposure %v; it was %v", unit, got, most)
		}
	}
	if s := m.must("/usr/bin/getent", "group", "viasocks"); !strings.HasPrefix(s, "viasocks:") {
		t.Errorf("systemd-sysusers made no group: %s", s)
	}
}
