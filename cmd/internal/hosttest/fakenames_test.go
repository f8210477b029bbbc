package hosttest

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
)

// asExcluded runs a program as the user that --exclude-uid names.
var asExcluded = []string{"setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"}

// webServer answers HTTP at every address of the world with that address.
func (w *world) webServer() {
	w.t.Helper()
	l := w.listen("world", ":80")
	s := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			at := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
			_, _ = io.WriteString(rw, strings.TrimSuffix(at.String(), ":80"))
		}),
	}
	go func() { _ = s.Serve(l) }()
	w.t.Cleanup(func() { _ = s.Close() })
}

// TestUpFakeNames: programs of the host use names while its proxy alone resolves them. A user who is excluded asks the host's own
// resolver and has real addresses. After `down` everybody has, and the host is as before.
func TestUpFakeNames(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, name := range []string{"curl", "getent", "setpriv"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed: scripts/deps.sh test")
		}
	}
	const byProxy, byRouter = "203.0.113.7", "203.0.113.8" // what the name means to each
	w := newWorld(t)
	w.webServer()
	w.answerNames("router", lanRouter4+":53", addr(byRouter)) // it stands in resolv.conf
	proxy, err := sockstest.Listen("tcp", proxy4+":1080", sockstest.WithNetns("/run/netns/proxy"),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name != "www.example" {
				return netip.Addr{}, fmt.Errorf("the proxy is asked for %s", name)
			}
			return addr(byProxy), nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })

	// The word that getent prints before the first space is an address; curl prints the one that the server was reached by.
	check := func(when string, as []string, resolved, reached netip.Prefix) {
		t.Helper()
		for _, c := range []struct {
			args []string
			want netip.Prefix
		}{
			{[]string{"getent", "ahostsv4", "www.example"}, resolved},
			{[]string{"curl", "-4", "-sS", "--max-time", "20", "http://www.example/"}, reached},
		} {
			out, err := try("host", nil, append(as[:len(as):len(as)], c.args...)...)
			word, _, _ := strings.Cut(out, " ")
			if a, bad := netip.ParseAddr(strings.TrimSpace(word)); err != nil || bad != nil || !c.want.Contains(a) {
				t.Errorf("%s: %s says %q, %v, want an address of %v", when, c.args[0], out, err, c.want)
			}
		}
	}
	one := func(a string) netip.Prefix { return netip.PrefixFrom(addr(a), 32) }
	before := w.state()
	check("before", nil, one(byRouter), one(byRouter))

	d := w.up("--proxy", proxyURL, "--exclude-uid", "12345")
	pool := netip.MustParsePrefix("198.18.0.0/15")
	check("up", nil, pool, one(byProxy))
	check("up, excluded", asExcluded, one(byRouter), one(byRouter))
	asked := proxy.Requests()
	if len(asked) != 1 || asked[0].Dst.Name != "www.example" {
		t.Errorf("the proxy was asked for %+v", asked)
	}
	if s := ask[control.Status](w, "status"); s.Names.Own < 2 || s.Names.Pool == nil || s.Names.Pool.Names != 1 {
		t.Errorf("names in status: %+v", s.Names)
	}

	if out, err := w.command("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	if err := d.wait(); err != nil {
		t.Error(err)
	}
	check("after down", nil, one(byRouter), one(byRouter))
	w.same("after down", before, w.state())
}
