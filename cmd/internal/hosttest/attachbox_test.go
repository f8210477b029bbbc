package hosttest

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// boxWorld is a world with a mirror, a recorder and a proxy that knows name.example.
func boxWorld(t *testing.T) (*world, *recorder, *sockstest.Server) {
	t.Helper()
	w := newWorld(t)
	w.mirror()
	rec := newRecorder(w)
	p, err := sockstest.Listen("tcp", proxy4+":1080", sockstest.WithNetns("/run/netns/proxy"),
		sockstest.WithResolve(func(name string) (netip.Addr, error) {
			if name != "name.example" {
				return netip.Addr{}, errors.New("there is no " + name)
			}
			return addr("203.0.113.7"), nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	rec.known(p)
	rec.answers = func(p packet) bool { return p.sport == 8081 }
	return w, rec, p
}

// styles are the containers of Docker and Podman.
var styles = map[string]style{
	"docker":              {scope: "docker-%s.scope", ownNet: true, publish: 8081},
	"docker without IPv6": {scope: "docker-%s.scope", ownNet: true, noIPv6: true, publish: 8081},
	"podman":              {scope: "libpod-%s.scope", publish: 8081},
}

// TestAttachBox: a container that a runtime has made is found by the beginning of its id. What its programs send goes through
// the proxy only, its published port answers, and `down` restores everything. When the container stops, viasocks ends with
// status 4 and leaves no file.
func TestAttachBox(t *testing.T) {
	if !apart(t) {
		return
	}
	for name, s := range styles {
		t.Run(name, func(t *testing.T) {
			testkit.CheckLeaks(t)
			w, rec, proxy := boxWorld(t)
			b := newBox(w, s)
			b.goes(t, "control", host4, host6, false)
			if rec.take() == nil {
				t.Fatal("control: the recorder does not see what the container sends")
			}
			before, hostBefore := b.stateOfBox(), w.state()

			d := w.attach("--container", b.id[:12])
			d.ready()
			rec.take()
			b.goes(t, "attached", proxy4, proxy6, true)
			if err := b.reach(s.publish); err != nil {
				t.Error("the published port: ", err)
			}
			if len(proxy.Requests()) == 0 {
				t.Error("the proxy had no request")
			}
			if out, err := w.command("ps"); err != nil || !strings.Contains(out, "container "+b.id[:12]) {
				t.Errorf("ps: %v\n%s", err, out)
			}
			for _, s := range rec.take() {
				t.Errorf("this left the host: %+v", s)
			}
			w.equal("the host, while its container is attached to", hostBefore, w.state())
			if out, err := w.command("down", "--container", b.id[:7]); err != nil {
				t.Errorf("down: %v\n%s", err, out)
			}
			if err := d.wait(); err != nil {
				t.Errorf("it ended with %v\n%s", err, d.log)
			}
			b.restored("detached", before)
			b.goes(t, "detached", host4, host6, false)
			b.stops(t)
		})
	}
}

// goes checks with which address the container's connections and datagrams reach the world.
func (b *box) goes(t *testing.T, when, from4, from6 string, names bool) {
	t.Helper()
	asks := map[string]string{"203.0.113.7": from4}
	if b.v6 != "" {
		asks["2001:db8:f::5"] = from6
	}
	for to, want := range asks {
		if got, err := b.program("nc", "-w", "20", to, "8000"); err != nil || got != want {
			t.Errorf("%s: TCP to %s came from %q, not %s: %v", when, to, got, want, err)
		}
		if got, err := b.w.mirrorUDP(b.ns, to); err != nil || got != want {
			t.Errorf("%s: UDP to %s came from %q, not %s: %v", when, to, got, want, err)
		}
	}
	if !names {
		return
	}
	a, err := b.resolve("name.example")
	if err != nil || !netip.MustParsePrefix("198.18.0.0/15").Contains(a) {
		t.Errorf("%s: name.example has the address %v: %v", when, a, err)
		return
	}
	if got, err := b.program("nc", "-w", "20", a.String(), "8000"); err != nil || got != from4 {
		t.Errorf("%s: TCP to a name came from %q, not %s: %v", when, got, from4, err)
	}
}

// restored waits until the container's namespace is as it was.
func (b *box) restored(when string, before map[string]string) {
	b.w.t.Helper()
	var after map[string]string
	testkit.Until(testkit.Patience, func() bool {
		after = b.stateOfBox()
		for k := range before {
			if before[k] != after[k] {
				return false
			}
		}
		return true
	})
	b.w.equal(when, before, after)
}

// stops attaches to the container again, stops it, and checks that viasocks notices.
func (b *box) stops(t *testing.T) {
	t.Helper()
	files, _ := try("", nil, "ls", "/run/viasocks")
	d := b.w.attach("--container", b.id)
	d.ready()
	b.kill()
	err := d.wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("the container has stopped, and viasocks ended with %v, not 4\n%s", err, d.log)
	}
	if want := "the container " + b.id + " has ended: nobody uses its network any more"; !strings.Contains(d.log.String(), want) {
		t.Errorf("it does not say %q:\n%s", want, d.log)
	}
	if left := b.w.run("", nil, "ls", "/run/viasocks"); left != files {
		t.Errorf("these files were there before:\n%sand these afterwards:\n%s", files, left)
	}
}
