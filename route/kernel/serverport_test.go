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
			inNamespace(t, func(t *testing.T) {
				w := newWorld(t)
				w.in(func() {
					ip(t, "route replace local 203.0.113.0/24 dev lo", "-6 route replace local 2001:db8:9::/64 dev lo",
						"route add default via 198.51.100.2", "-6 route add default via 2001:db8:1::2")
				})
				c := testConfig(t)
				c.InboundPorts = []PortRange{{500, 500}, {5550, 5560}}
				h, tun := up(t, c)
				server := &talker{t: t, w: w, v6: v6, port: 5555}
				server.open()
				other := &talker{t: t, w: w, v6: v6, port: 5561}
				other.open()
				check := func(what string, k *talker, n int, want bool) {
					t.Helper()
					if k.left(want, n) != want {
						t.Errorf("%s: left directly: %v, want %v", what, !want, want)
					}
				}
				change := func(set func(*Config)) {
					t.Helper()
					next := c
					set(&next)
					if err := h.Change(next); err != nil {
						t.Fatal(err)
					}
				}
				check("of its own accord", server, 1, false)
				server.forge(2)
				check("the answer to a client, though the port has spoken", server, 2, true)
				check("of its own accord, again", server, 1, false)
				server.forge(1)
				check("the answer to whom it spoke to first", server, 1, true)
				check("of its own accord, to another", server, 3, false)
				forget(t)
				check("first, to whom it answered a while ago", server, 2, true)
				check("to a stranger, after conntrack forgot", server, 4, false)
				server.forge(4)
				check("the answer to the stranger", server, 4, true)

				check("another port, of its own accord", other, 1, false)
				other.forge(1)
				check("another port, forged between", other, 1, false)
				other.forge(2)
				check("another port, forged before the first", other, 2, false)

				change(func(c *Config) { c.CarryInbound, c.Exclude.Devices = true, []string{"br0"} })
				server.forge(5)
				check("inbound is carried, but for another device", server, 5, false)
				change(func(c *Config) { c.CarryInbound, c.Exclude.Devices = true, []string{"eth0"} })
				check("of its own accord, with an excluded device", server, 6, false)
				server.forge(6)
				check("inbound is carried, but for this device", server, 6, true)
				change(func(c *Config) { c.InboundPorts = nil })
				server.forge(7)
				check("the port is not named any more", server, 7, false)
				check("the port is not named any more, to a client of before", server, 2, false)
				change(func(*Config) {})
				server.forge(7)
				check("the port is named again", server, 7, true)

				// Somebody begins to listen after the first question.
				server.conn.Close()
				server.forge(8)
				server.open()
				check("of its own accord, to whom nobody has heard", server, 8, false)
				server.forge(8)
				check("the answer of a server that began late", server, 8, true)
				server.conn.Close()
				other.conn.Close()
				down(t, h)
				tun.Close()
			})
		})
	}
}
