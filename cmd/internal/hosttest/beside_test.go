package hosttest

import (
	"strings"
	"testing"
)

// TestChildOfTheUplink proves what the manual says of a macvlan device whose parent is the uplink. In another namespace it is a
// host of its own: its frames pass by the filter, and only --strict stops them. In the host's own it is a device like others.
func TestChildOfTheUplink(t *testing.T) {
	if !apart(t) {
		return
	}
	t.Run("default", func(t *testing.T) { childOfTheUplink(t, false) })
	t.Run("strict", func(t *testing.T) { childOfTheUplink(t, true, "--strict") })
}

func childOfTheUplink(t *testing.T, strict bool, flags ...string) {
	w, _ := closedUp(t, flags...)
	if out, err := try("", nil, "ip", "-n", "host", "link", "add", "link", "eth0", "name", "child0", "type", "macvlan", "mode",
		"bridge"); err != nil {
		t.Skip("no macvlan: ", err, out)
	}
	w.ip(
		"host",
		"link set child0 up\naddr add 198.51.100.8/32 dev child0\nroute add 203.0.113.7/32 dev child0 via "+router4+" onlink",
	)
	if _, err := w.connect(netipAddrPort("203.0.113.7", 77), "child0"); err == nil {
		t.Errorf("strict %v: a child in the host's own namespace gets past viasocks", strict)
	}
	w.ip("host", "addr del 198.51.100.8/32 dev child0\nlink set child0 netns ctr")
	w.ip("ctr", "link set child0 up\naddr add 198.51.100.9/24 dev child0\nroute add 203.0.113.0/24 via "+router4+" dev child0")
	c, err := w.dial("ctr", netipAddrPort("203.0.113.7", 77))
	if err == nil {
		if err = exchange(c, 100); err == nil && !strings.HasPrefix(c.LocalAddr().String(), "198.51.100.9:") {
			t.Errorf("it has the address %s", c.LocalAddr())
		}
	}
	if strict == (err == nil) {
		t.Errorf("strict %v: a child in another namespace: %v", strict, err)
	}
}
