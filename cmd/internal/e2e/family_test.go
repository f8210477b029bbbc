package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dead makes connections to an address fail as behind a router without a route. The kernel still has a route of its own, so
// getaddrinfo puts the address first.
func dead(t *testing.T, family, address, why string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader("table " + family + ` dead {
	chain out {
		type filter hook output priority 0;
		` + family + " daddr " + address + " meta l4proto tcp reject with " + why + `
	}
}`)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("nft", "delete", "table", family, "dead").Run() })
}

// TestSecondFamily: microsocks tries the first address of a name only. Where that is an IPv6 address that is dead, curl and a
// program that knows IPv4 only still get to the IPv4 address, and a name whose port is closed is refused at once.
func TestSecondFamily(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "unbound", "microsocks", "curl", "nft")
	if os.Geteuid() != 0 {
		t.Skip("nft needs root")
	}
	nginx(t, world4+":8080")
	unbound(t, "both.example. 60 A "+world4, "both.example. 60 AAAA "+other6, "four.example. 60 A "+world4)
	dead(t, "ip6", other6, "icmpv6 no-route")
	const at = "127.0.0.1:1081"
	serve(t, at, "microsocks", "-i", "127.0.0.1", "-p", "1081")
	flags := []string{"--proxy", "socks5://" + at, "--dns", "fake,tcp://" + world4, "--log-level", "debug"}
	r := run(t, flags, "sh", "-c", `for f in -4 -6 ""; do curl -s -m 10 $f http://both.example:8080; echo; done`)
	if got := strings.Fields(r.out); len(got) != 3 || got[0] != "served" || got[1] != "served" || got[2] != "served" {
		t.Errorf("curl got %q", got)
	}
	// Without -4 or -6, curl connects by the other family, too, if the first has not answered after 200 ms.
	if n := strings.Count(r.stderr, "trying its IPv4 address"); n != 3 && n != 4 {
		t.Errorf("%d second tries are in the log:\n%s", n, r.stderr)
	}
	testkit.Tries(t, "curl to a closed port", func() error {
		r := run(t, flags, "curl", "-s", "-m", "10", "http://four.example:8081")
		if r.exit != 7 || r.took > 3*time.Second || strings.Contains(r.stderr, "trying its IPv4 address") {
			return fmt.Errorf("%d after %v\n%s", r.exit, r.took, r.stderr)
		}
		return nil
	})
	// Without a resolver there is nothing to try.
	r = run(t, []string{"--proxy", "socks5://" + at, "--dns", noResolver}, "curl", "-s", "-m", "10", "http://both.example:8080")
	if r.exit != 7 {
		t.Errorf("curl without a resolver: %d, %q", r.exit, r.out)
	}
}

// TestSecondFamilyIPv6: go-socks5 tries the IPv4 address of a name that has both. Where that is dead, curl gets to the IPv6
// address, whatever its own family.
func TestSecondFamilyIPv6(t *testing.T) {
	needPrograms(t, "nginx", "unbound", "curl", "nft")
	server := zooServer("go-socks5")
	if os.Geteuid() != 0 || server == "" {
		t.Skip("nft needs root, and go-socks5 is built by scripts/zoo.sh")
	}
	nginx(t, "["+world6+"]:8080")
	unbound(t, "both.example. 60 A "+other4, "both.example. 60 AAAA "+world6)
	dead(t, "ip", other4, "icmp net-unreachable")
	const at = "127.0.0.1:1081"
	serve(t, at, server, at)
	r := run(t, []string{"--proxy", "socks5://" + at, "--dns", "fake,tcp://" + world4, "--log-level", "debug"}, "sh", "-c",
		`for f in -4 -6 ""; do curl -s -m 10 $f http://both.example:8080; echo; done`)
	if got := strings.Fields(r.out); len(got) != 3 || got[0] != "served" || got[1] != "served" || got[2] != "served" {
		t.Errorf("curl got %q\n%s", got, r.stderr)
	}
	// As in TestSecondFamily, curl may connect by both families.
	if n := strings.Count(r.stderr, "trying its IPv6 address"); n != 3 && n != 4 {
		t.Errorf("%d tries of IPv6 are in the log:\n%s", n, r.stderr)
	}
}
