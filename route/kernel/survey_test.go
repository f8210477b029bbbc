package kernel

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Look names what is in the way, and changes nothing.
func TestLook(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		look := func() Survey {
			t.Helper()
			s, err := Look(c)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		if s := look(); s.Conflict != nil || len(s.Foreign) > 0 || s.Left || s.Unseen != nil {
			t.Errorf("a host where nothing is: %+v", s)
		}
		for _, l := range []string{
			"rule add to 100.64.0.0/10 lookup 700 pref 5000", "rule add not fwmark 0x52 lookup 701 pref 5001",
			"rule add not fwmark 0x52 lookup 702 pref 5002", "rule add lookup main suppress_prefixlength 0 pref 5003",
			"rule add prohibit pref 5004", "rule add fwmark 0x52000000/0xff000000 lookup 701 pref 5005",
			"rule add lookup 701 pref 30000",
			"route add 0.0.0.0/1 dev eth0 table 701", "route add 198.18.0.0/16 dev eth0 table 702",
		} {
			ip(t, l)
		}
		all := map[string]bool{}
		for _, r := range look().Foreign {
			all[strings.Fields(r.Text)[1]] = r.All
			if r.Option == "" {
				t.Errorf("no option for %+v", r)
			}
		}
		want := map[string]bool{"5000:": false, "5001:": true, "5002:": false, "5003:": false, "5004:": true, "5005:": false}
		for prio, takes := range want {
			if got, ok := all[prio]; !ok || got != takes {
				t.Errorf("rule %s: takes all: %v, there: %v, want %v", prio, got, ok, takes)
			}
		}
		if len(all) != len(want) {
			t.Errorf("rules: %v", all)
		}
		ip(t, "rule add lookup 800 pref 31000", "rule del lookup 800 pref 31000")
		ip(t, "rule add fwmark 1 lookup 700 pref 9005")
		if s := look(); s.Conflict == nil || !strings.Contains(s.Conflict.Error(), "--priority") {
			t.Errorf("a priority of ours that somebody else has: %v", s.Conflict)
		}
	})
}

// Look tells what a daemon has done to the host, also while it holds the lock.
func TestLookLeft(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		h, tun := up(t, c)
		s, err := Look(c)
		if err != nil || !s.Left || s.Conflict != nil {
			t.Errorf("%+v, %v", s, err)
		}
		down(t, h)
		tun.Close()
		if s, err = Look(c); err != nil || s.Left {
			t.Errorf("after down: %+v, %v", s, err)
		}
	})
}

// Try finds a kernel that lacks something, in a namespace of its own.
func TestTry(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		before := hostState(t)
		if err := Try(c); err != nil {
			t.Error(err)
		}
		wrong := errors.New("told to fail")
		n := 0
		old := step
		step = func() error {
			if n++; n == 1 {
				return wrong
			}
			return nil
		}
		err := Try(c)
		step = old
		if !errors.Is(err, wrong) {
			t.Errorf("a failure of the first step: %v", err)
		}
		if after := hostState(t); !slices.Equal(before, after) {
			t.Errorf("the host changed:\n%v\n%v", before, after)
		}
	})
}

func hostState(t *testing.T) []string {
	t.Helper()
	var s []string
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		nl, err := openRouting()
		if err != nil {
			t.Fatal(err)
		}
		rules, err := listRules(nl, f)
		nl.Close()
		if err != nil {
			t.Fatal(err)
		}
		for i := range rules {
			s = append(s, rules[i].String())
		}
	}
	return s
}

// Steered names what is missing.
func TestSteered(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := testConfig(t)
		if err := Steered(c.TUN, c.Table); err == nil || !strings.Contains(err.Error(), "missing") {
			t.Errorf("before: %v", err)
		}
		h, tun := up(t, c)
		if err := Steered(c.TUN, c.Table); err != nil {
			t.Error(err)
		}
		for _, gone := range []struct{ undo, want string }{
			{"route flush table %d", "the route to the TUN"}, {"rule del table %d", "rules"}, {"link set %s down", "is down"},
		} {
			arg := any(c.Table)
			if strings.Contains(gone.undo, "%s") {
				arg = c.TUN
			}
			if strings.HasPrefix(gone.undo, "rule") { // each of them
				for range 64 {
					if exec.Command("ip", strings.Fields(fmt.Sprintf(gone.undo, arg))...).Run() != nil {
						break
					}
				}
			} else {
				ip(t, fmt.Sprintf(gone.undo, arg))
			}
			if err := Steered(c.TUN, c.Table); err == nil || !strings.Contains(err.Error(), gone.want) {
				t.Errorf("%s: %v", gone.undo, err)
			}
		}
		down(t, h)
		tun.Close()
	})
}
