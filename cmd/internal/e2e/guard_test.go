package e2e

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// decided is a line of --decisions.
type decided struct {
	Time                           time.Time
	Proto, Src, Dst, Verdict, Rule string
	Names                          []string
	UID                            *int
	PID                            int
	Exe, Cgroup                    string
	Lost                           int
}

// decisionsIn reads a file of --decisions.
func decisionsIn(t *testing.T, file string) (all []decided) {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the file of decisions has mode %v", info.Mode())
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var d decided
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, d)
	}
	return all
}

// TestGuard is the egress guard with real programs: what is allowed works, by name and by port, and everything else is
// refused at once; without a proxy and with one. Each decision is in the file, with the program that asked.
func TestGuard(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "dnsmasq", "curl")
	nginx(t, world4+":8080", other4+":8080", other4+":8081", "["+world6+"]:8081", world4+":8082")
	dnsmasq(t, "--address=/db.example.com/"+world4, "--address=/other.example/"+other4)
	guard := []string{"--allow", "tcp:DB.example.com:8080", "--allow", "tcp:8081", "--allow", "tcp:198.51.100.0/24:*"}
	for _, proxied := range []bool{false, true} {
		name := "direct"
		if proxied {
			name = "proxy"
		}
		t.Run(name, func(t *testing.T) {
			flags := guard
			verdict := "direct"
			reached := func() []string { return nil }
			if proxied {
				proxy := listenSOCKS(t)
				flags = append([]string{"--proxy", proxy.URL(), "--dns", "tcp://" + world4}, guard...)
				verdict = "via proxy"
				reached = func() (out []string) {
					for _, r := range proxy.Requests() {
						out = append(out, netip.AddrPortFrom(r.Dst.IP, r.Dst.Port).String())
					}
					return out
				}
			}
			file := filepath.Join(t.TempDir(), "decisions")
			flags = append([]string{"--decisions", file}, flags...)
			got := curl(t, flags,
				"http://"+world4+":8080",      // without its name
				"http://db.example.com:8080",  // by its name
				"http://other.example:8080",   // another name
				"http://db.example.com:8082",  // another port
				"http://"+other4+":8081",      // any host on this port
				"http://["+world6+"]:8081",    // of either family
				"http://no-such.example:8081", // names are resolved
			)
			if want := strings.Join([]string{noConnect, served, noConnect, noConnect, served, served, noName},
				"\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			for _, to := range reached() {
				switch to {
				case world4 + ":53", world4 + ":8080", other4 + ":8081", "[" + world6 + "]:8081":
				default:
					t.Errorf("the proxy was asked for %s", to)
				}
			}
			type want struct{ dst, name, verdict string }
			wants := []want{
				{
					world4 + ":8080",
					"",
					"reject",
				}, {world4 + ":8080", "db.example.com", verdict}, {other4 + ":8080", "other.example", "reject"},
				{
					world4 + ":8082",
					"db.example.com",
					"reject",
				}, {other4 + ":8081", "other.example", verdict}, {"[" + world6 + "]:8081", "", verdict},
			}
			all := slices.DeleteFunc(decisionsIn(t, file), func(d decided) bool { return strings.HasSuffix(d.Dst, ":53") })
			if len(all) != len(wants) {
				t.Fatalf("%d decisions, want %d: %+v", len(all), len(wants), all)
			}
			for i, w := range wants {
				d := all[i]
				if got := (want{d.Dst, strings.Join(d.Names, " "), d.Verdict}); got != w {
					t.Errorf("decision %d is %+v, want %+v", i, d, w)
				}
				if !strings.HasSuffix(d.Exe, "/curl") || d.PID == 0 || d.UID == nil || *d.UID != os.Getuid() ||
					d.Proto != "tcp" ||
					time.Since(d.Time) > time.Minute {
					t.Errorf("decision %d: %+v", i, d)
				}
				if (d.Verdict == "reject") != (d.Rule == "none") {
					t.Errorf("decision %d: the rule is %q", i, d.Rule)
				}
			}
		})
	}
}

// TestGuardOfNames: where all that is allowed has a name or an address, no other name is asked for: not by the resolver's
// own log. Questions over TCP are judged like the others.
func TestGuardOfNames(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "dnsmasq", "curl", "dig")
	nginx(t, world4+":8080")
	asked := filepath.Join(t.TempDir(), "asked")
	dnsmasq(t, "--address=/example.com/"+world4, "--log-queries", "--log-facility="+asked)
	file := filepath.Join(t.TempDir(), "decisions")
	flags := []string{"--allow", "tcp:db.example.com:8080", "--allow", "tcp:" + other4 + ":8080", "--decisions", file}
	got := curl(t, flags, "http://db.example.com:8080", "http://secret.example.com:8080")
	if want := served + "\n" + noName; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	r := run(
		t,
		flags,
		"sh",
		"-c",
		"dig +tries=1 +time=20 secret.example.com TXT; dig +tcp +tries=1 +time=20 secret.example.com; "+
			"dig +short db.example.com; dig +tcp +short db.example.com",
	)
	if strings.Count(r.out, "status: REFUSED") != 2 || !strings.HasSuffix(strings.TrimSpace(r.out), world4) {
		t.Errorf("dig says %s", r.out)
	}
	log, err := os.ReadFile(asked)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "db.example.com") || strings.Contains(string(log), "secret") {
		t.Errorf("the resolver was asked:\n%s", log)
	}
	verdicts := map[string]bool{}
	for _, d := range decisionsIn(t, file) {
		if strings.HasSuffix(d.Dst, ":53") {
			verdicts[d.Proto+" "+d.Verdict+" "+strings.Join(d.Names, " ")] = true
		}
	}
	for _, want := range []string{"udp resolve db.example.com", "udp reject secret.example.com", "tcp reject secret.example.com",
		"tcp resolve db.example.com"} {
		if !verdicts[want] {
			t.Errorf("no decision %q in %v", want, verdicts)
		}
	}
}

// TestGuardDatagrams: datagrams are judged by both endpoints, and refused at once as well.
func TestGuardDatagrams(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	yes, yesAddr := farUDP(t, world4)
	no, noAddr := farUDP(t, world4)
	file := filepath.Join(t.TempDir(), "decisions")
	a := startApp(t, "--allow", "udp:"+world4+":"+port(yesAddr), "--dns", "tcp://"+world4, "--decisions", file)
	u := a.udp(false)
	testkit.EventuallyIn(t, testkit.Patience, "what is allowed goes and comes", func() bool {
		return exchange(t, u, yes, yesAddr, "allowed")
	})
	fd := a.socket(syscall.AF_INET, syscall.SOCK_DGRAM)
	defer syscall.Close(fd)
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(noAddr.Port()), Addr: noAddr.Addr().As4()}); err != nil {
		t.Fatal(err)
	}
	testkit.EventuallyIn(t, testkit.Patience, "port unreachable", func() bool {
		_, err := syscall.Write(fd, []byte("must not arrive"))
		return err == syscall.ECONNREFUSED
	})
	no.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, _, err := no.ReadFrom(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes arrived that nothing allows", n)
	}
	a.conn.Close()
	a.conn = nil
	testkit.EventuallyIn(t, testkit.Patience, "both decisions", func() bool {
		verdicts := map[string]string{}
		for _, d := range decisionsIn(t, file) {
			verdicts[d.Dst] = d.Verdict
		}
		return verdicts[yesAddr.String()] == "direct" && verdicts[noAddr.String()] == "reject"
	})
}

func port(a netip.AddrPort) string { return a.String()[strings.LastIndexByte(a.String(), ':')+1:] }

// TestRulesByOwner: the same connection is let out for one program and refused for another; so is one for one user.
func TestRulesByOwner(t *testing.T) {
	if !apart(t) {
		return
	}
	needPrograms(t, "nginx", "curl", "aria2c", "setpriv")
	nginx(t, world4+":8080")
	url := "http://" + world4 + ":8080/index.html"
	const dns = "tcp://" + world4
	aria2c := "aria2c -q --no-conf --allow-overwrite=true --max-tries=1 -d /tmp -o viasocks-owner.test " + url + "; echo $?"
	t.Cleanup(func() { os.Remove("/tmp/viasocks-owner.test") })
	flags := []string{"--dns", dns, "--rule", "exe */curl direct"}
	if got := curl(t, flags, url, url, url); got != strings.Join([]string{served, served, served}, "\n") {
		t.Errorf("curl by its name: %q", got)
	}
	if r := run(t, flags, "sh", "-c", aria2c); strings.TrimSpace(r.out) == "0" {
		t.Errorf("aria2c may do what only curl may: %+v", r)
	}
	if r := run(t, []string{"--dns", dns, "--rule", "not exe */curl direct"}, "sh", "-c", aria2c); strings.TrimSpace(
		r.out,
	) != "0" {
		t.Errorf("aria2c may not: %+v", r)
	}
	if os.Getuid() != 0 {
		t.Skip("the part about users needs root")
	}
	flags = []string{"--dns", dns, "--rule", "user 65534 direct"}
	get := "curl -s -m 10 --noproxy '*' " + url + "; echo $?"
	if r := run(t, flags, "sh", "-c", get); strings.TrimSpace(r.out) != noConnect {
		t.Errorf("root may do what only user 65534 may: %+v", r)
	}
	if r := run(t, flags, "setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", get); strings.TrimSpace(r.out) != "served0" {
		t.Errorf("user 65534 may not: %+v", r)
	}
}
