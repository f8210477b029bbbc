package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestUPnP: a real client of UPnP finds the gateway by multicast, the proxy's address and a port, which works, lists it and
// gives it up. Nobody answers without --listen.
func TestUPnP(t *testing.T) {
	if !apart(t) {
		return
	}
	url := binding(t)
	needPrograms(t, "upnpc")
	a := startApp(t, "--proxy", url, "--listen", "auto")
	l, outer := a.listen(6885), fmt.Sprint(freePort(t))
	ask := func(args []string, want ...string) {
		t.Helper()
		// -i: upnpc takes a gateway whose outer address is one for documentation for a disconnected one.
		got, _ := a.run("upnpc", append([]string{"-i"}, args...)...)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Fatalf("upnpc %v says no %q:\n%s", args, w, got)
			}
		}
	}
	ask([]string{"-s"}, "http://198.18.0.2:1900/rootDesc.xml", "ExternalIPAddress = "+world4, "Connection Type : IP_Routed",
		"Status : Connected")
	ask([]string{"-a", "198.18.0.1", "6885", outer, "TCP", "600"},
		world4+":"+outer+" TCP is redirected to internal 198.18.0.1:6885 (duration=")
	c := peer(t, world4+":"+outer)
	sendBoth(t, c, acceptFrom(t, l, c))
	c.Close()
	ask([]string{"-a", "198.18.0.9", "6885", outer, "TCP"}, "failed with code 606")
	taken, at := listenTCP(t, world4) // dante gives another port instead of this one
	defer taken.Close()
	ask([]string{"-a", "198.18.0.1", "6886", fmt.Sprint(at.Port()), "TCP"}, "failed with code 718")
	ask([]string{"-n", "198.18.0.1", "6887", fmt.Sprint(at.Port()), "TCP"}, "is redirected to internal 198.18.0.1:6887")
	second := a.status().Listening.Ports[1]
	_, port, _ := strings.Cut(second.Outer, ":")
	ask([]string{"-l"}, "0 TCP ", "->198.18.0.1:6885 ", " 1 TCP ", port+"->198.18.0.1:6887 ", "(SpecifiedArrayIndexInvalid)")
	ask([]string{"-d", port, "TCP"}, "UPNP_DeletePortMapping() returned : 0")
	ask([]string{"-d", port, "TCP"}, "UPNP_DeletePortMapping() failed with code : 714")
	testkit.Eventually(t, "the end of its BIND", func() bool { return len(a.status().Listening.Ports) == 1 })
	ask([]string{"-d", outer, "TCP"}, "UPNP_DeletePortMapping() returned : 0")
	none := startApp(t, "--proxy", url)
	if got, _ := none.run("upnpc", "-s"); !strings.Contains(got, "No IGD UPnP Device found") {
		t.Errorf("without --listen: %s", got)
	}
}
