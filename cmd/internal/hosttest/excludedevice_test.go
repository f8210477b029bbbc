package hosttest

import (
	"net"
	"testing"
)

// TestExcludedDeviceInbound: connections from outside by a device that is excluded work, and those that were open before;
// what the host itself opens is carried.
func TestExcludedDeviceInbound(t *testing.T) {
	t.Parallel()
	for _, o := range []struct {
		name  string
		flags []string
	}{
		{"inbound keep", nil},
		{"inbound carry", []string{"--inbound", "carry"}},
	} {
		t.Run(o.name, func(t *testing.T) {
			if !apart(t) {
				return
			}
			w := newWorld(t)
			w.hostServers()
			serve(w.listen("world", ":77"), echo)
			if err := setProxyName(proxy4); err != nil {
				t.Fatal(err)
			}
			w.proxy(proxy4 + ":1080")
			before := map[string]net.Conn{}
			quiet := map[string]func(*world) error{} // the first word is said after up
			for i, out := range outside {
				s, err := w.login(out.client, out.host)
				if err != nil {
					t.Fatal(err)
				}
				before[out.name] = s
				quiet[out.name+", the server speaks first"] = w.silentOn(uint16(2200+2*i), out.client, out.host, 1, false)
				quiet[out.name+", the client speaks first"] = w.silentOn(uint16(2201+2*i), out.client, out.host, 1, true)
			}
			check := func(when string, carried bool) {
				t.Helper()
				w.works(when, host4, host6, carried)
				for name, s := range before {
					if err := lines(s); err != nil {
						t.Errorf("%s: ssh opened before up, %s: %v", when, name, err)
						delete(before, name)
					}
				}
			}
			d := w.up(append([]string{"--proxy", proxyURL, "--exclude-device", "eth0"}, o.flags...)...)
			for name, speak := range quiet {
				if err := speak(w); err != nil {
					t.Errorf("opened before up, %s: %v", name, err)
				}
			}
			check("up", true)
			d.kill()
			check("killed", false)
		})
	}
}
