package kernel

import (
	"fmt"
	"testing"
)

// A UDP port that the user has named as a server's answers directly who asks, whatever it has sent. What it sends of its own
// accord goes through the proxy, as does what other ports send.
func TestInboundPorts(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("IPv6 %v", v6), func(t *testing.T) {
			inNamespace(t, func(t *testing.T) { inboundPorts(t, v6) })
		})
	}
}

func inboundPorts(t *testing.T, v6 bool) {
	w := newWorld(t)
	w.isAnyone(t)
	c := testConfig(t)
	c.InboundPorts = []PortRange{{500, 500}, {5550, 5560}}
	h, tun := up(t, c)
	server := &talker{t: t, w: w, v6: v6, port: 5555}
	server.open()
	other := &talker{t: t, w: w, v6: v6, port: 5561}
	other.open()
	answersOnly(t, server)
	other.leaves("another port, of its own accord", 1, false)
	other.forge(1)
	other.leaves("another port, forged between", 1, false)
	other.forge(2)
	other.leaves("another port, forged before the first", 2, false)
	changesOfPorts(t, h, c, server)

	// Somebody begins to listen after the first question.
	server.conn.Close()
	server.forge(8)
	server.open()
	server.leaves("of its own accord, to whom nobody has heard", 8, false)
	server.forge(8)
	server.leaves("the answer of a server that began late", 8, true)
	server.conn.Close()
	other.conn.Close()
	down(t, h)
	tun.Close()
}

// answersOnly has the server speak by itself, which is carried, and answer clients, which is not.
func answersOnly(t *testing.T, server *talker) {
	t.Helper()
	server.leaves("of its own accord", 1, false)
	server.forge(2)
	server.leaves("the answer to a client, though the port has spoken", 2, true)
	server.leaves("of its own accord, again", 1, false)
	server.forge(1)
	server.leaves("the answer to whom it spoke to first", 1, true)
	server.leaves("of its own accord, to another", 3, false)
	forget(t)
	server.leaves("first, to whom it answered a while ago", 2, true)
	server.leaves("to a stranger, after conntrack forgot", 4, false)
	server.forge(4)
	server.leaves("the answer to the stranger", 4, true)
}

// changesOfPorts changes what becomes of connections from outside, and which ports are named.
func changesOfPorts(t *testing.T, h *Host, c Config, server *talker) {
	t.Helper()
	change := func(set func(*Config)) {
		t.Helper()
		next := c
		set(&next)
		if err := h.Change(next); err != nil {
			t.Fatal(err)
		}
	}
	change(func(c *Config) { c.CarryInbound, c.Exclude.Devices = true, []string{"br0"} })
	server.forge(5)
	server.leaves("inbound is carried, but for another device", 5, false)
	change(func(c *Config) { c.CarryInbound, c.Exclude.Devices = true, []string{"eth0"} })
	server.leaves("of its own accord, with an excluded device", 6, false)
	server.forge(6)
	server.leaves("inbound is carried, but for this device", 6, true)
	change(func(c *Config) { c.InboundPorts = nil })
	server.forge(7)
	server.leaves("the port is not named any more", 7, false)
	server.leaves("the port is not named any more, to a client of before", 2, false)
	change(func(*Config) {})
	server.forge(7)
	server.leaves("the port is named again", 7, true)
}

// leaves wants what the program sends to a peer to leave directly, or not to.
func (k *talker) leaves(what string, n int, want bool) {
	k.t.Helper()
	if k.left(want, n) != want {
		k.t.Errorf("%s: left directly: %v, want %v", what, !want, want)
	}
}
