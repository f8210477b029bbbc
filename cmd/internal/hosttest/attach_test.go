package hosttest

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// attach starts `viasocks attach` in the host namespace and does not wait.
func (w *world) attach(flags ...string) *daemon {
	w.t.Helper()
	d := &daemon{t: w.t, log: &harness.Log{}, done: make(chan error, 1)}
	d.cmd = exec.Command(viasocks, append([]string{"attach", "--proxy", "socks5://" + proxy4 + ":1080"}, flags...)...)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.started = time.Now()
	w.in("host", d.cmd.Start)
	go func() { d.done <- d.cmd.Wait() }()
	w.t.Cleanup(d.end)
	return d
}

// lifetime of an address from a router, which runs down.
var lifetime = regexp.MustCompile(`"(valid|preferred)_life_time":\d+,?`)

// stateOf is what must come back in a container's namespace.
func (w *world) stateOf(ns string) map[string]string {
	w.t.Helper()
	s := map[string]string{
		"ip -j addr":                 lifetime.ReplaceAllString(w.run("", nil, "ip", "-n", ns, "-j", "addr"), ""),
		"ip rule":                    w.ip(ns, "rule"),
		"ip -6 rule":                 w.ip(ns, "-6 rule"),
		"ip route show table all":    sorted(w.ip(ns, "-4 route show table all")),
		"ip -6 route show table all": sorted(expires.ReplaceAllString(w.ip(ns, "-6 route show table all"), "")),
		"nft list ruleset":           w.run(ns, nil, "nft", "list", "ruleset"),
	}
	w.in(ns, func() error { s["sysctl"] = sysctls(); return nil })
	return s
}

// restored waits until the namespace is as it was: the kernel takes away a little after an address what came with it.
func (w *world) restored(when, ns string, before map[string]string) {
	w.t.Helper()
	var after map[string]string
	testkit.Until(testkit.Patience, func() bool { after = w.stateOf(ns); return maps.Equal(before, after) })
	w.equal(when, before, after)
}

// container is a world whose container serves port 80, which the host publishes as 8080, and whose outside serves port 77.
func container(t *testing.T) (*world, *recorder, *sockstest.Server) {
	t.Helper()
	w := newWorld(t)
	serve(w.listen("ctr", ":80"), echo)
	serve(w.listen("world", ":77"), echo)
	rec := newRecorder(w)
	p := w.proxy(proxy4 + ":1080")
	rec.known(p)
	// The published port answers who connects to it.
	rec.answers = func(p packet) bool { return p.sport == 8080 }
	return w, rec, p
}

// attachedPort connects to the published port from the world.
func (w *world) attachedPort(to string) error {
	c, err := w.dial("world", netipAddrPort(to, 8080))
	if err != nil {
		return err
	}
	defer c.Close()
	return exchange(c, 5000)
}

// outgoing has the container connect to the world.
func (w *world) outgoing(to string) error { return w.outgoingWithin(to, 5*time.Second) }

func (w *world) outgoingWithin(to string, patience time.Duration) error {
	return in("ctr", func() error {
		c, err := (&net.Dialer{Timeout: patience, KeepAlive: -1}).Dial("tcp", netipAddrPort(to, 77).String())
		if err != nil {
			return err
		}
		defer c.Close()
		return exchange(c, 5000)
	})
}

// question asks for the address of a name.
func question(name string) []byte {
	q := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	b, err := q.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// nameInside asks a name server from the container for the address of a name.
func (w *world) nameInside(server, name string) (addrs []string, err error) {
	w.t.Helper()
	return w.nameFrom("ctr", server, name)
}

// nameFrom asks a name server from a namespace for the address of a name.
func (w *world) nameFrom(ns, server, name string) (addrs []string, err error) {
	w.t.Helper()
	c := w.packets(ns, ":0")
	defer c.Close()
	if _, err := c.WriteToUDPAddrPort(question(name), netip.MustParseAddrPort(server)); err != nil {
		return nil, err
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 1500)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		return nil, err
	}
	if got := netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String(); got != server {
		return nil, fmt.Errorf("%s answers, not %s", got, server)
	}
	var a dnsmessage.Message
	if err := a.Unpack(b[:n]); err != nil {
		return nil, err
	}
	for _, r := range a.Answers {
		if x, ok := r.Body.(*dnsmessage.AResource); ok {
			addrs = append(addrs, netip.AddrFrom4(x.A).String())
		}
	}
	return addrs, nil
}

// TestAttach: while a container is attached to, its published port answers, old connections from outside go on, what it
// sends goes through the proxy and nothing else leaves the host; in the end everything is as it was.
func TestAttach(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, proxy := container(t)
	before := w.stateOf("ctr")
	hostBefore := w.state()
	old, err := w.dial("world", netipAddrPort(host4, 8080))
	if err != nil {
		t.Fatal("control: the published port does not answer: ", err)
	}
	if err := exchange(old, 100); err != nil {
		t.Fatal("control: ", err)
	}
	for _, to := range []string{"203.0.113.7", "2001:db8:f::7"} {
		if err := w.outgoing(to); err != nil {
			t.Fatal("control: ", err)
		}
		if rec.take() == nil {
			t.Fatalf("control: the recorder does not see the container's connection to %s", to)
		}
	}

	d := w.attach("--netns", "ctr")
	d.ready()
	rec.take()
	if err := exchange(old, 5000); err != nil {
		t.Error("the connection from outside that was open before: ", err)
	}
	for _, to := range []string{host4, host6} {
		if err := w.attachedPort(to); err != nil {
			t.Errorf("the published port at %s: %v", to, err)
		}
	}
	n := len(proxy.Requests())
	for _, to := range []string{"203.0.113.7", "2001:db8:f::7"} {
		if err := w.outgoing(to); err != nil {
			t.Errorf("to %s: %v", to, err)
		}
	}
	if got := len(proxy.Requests()) - n; got != 2 {
		t.Errorf("the proxy had %d requests, not 2", got)
	}
	addrs, err := w.nameInside("203.0.113.53:53", "name.example")
	if err != nil || len(addrs) != 1 || !strings.HasPrefix(addrs[0], "198.18.") {
		t.Errorf("a name: %v, %v", addrs, err)
	}
	out, err := w.command("ps")
	if err != nil || !strings.Contains(out, "network namespace ctr") {
		t.Errorf("ps: %v\n%s", err, out)
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	w.equal("the host, while its container is attached to", hostBefore, w.state())
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	w.restored("detached", "ctr", before)
	if err := exchange(old, 100); err != nil {
		t.Error("the connection from outside, detached: ", err)
	}
	if err := w.attachedPort(host4); err != nil {
		t.Error("the published port, detached: ", err)
	}
	if err := w.outgoing("203.0.113.7"); err != nil {
		t.Error("detached: ", err)
	}
}

// TestAttachEnds: viasocks ends with its own exit status when the container's namespace does, and nothing is left.
func TestAttachEnds(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, _, _ := container(t)
	w.run("", nil, "ip", "netns", "add", "short")
	t.Cleanup(func() { _, _ = try("", nil, "ip", "netns", "del", "short") })
	w.ip("short", "link set lo up")
	program := exec.Command("sleep", "1000")
	w.in("short", program.Start)
	stopped := func() { _ = program.Process.Kill(); _ = program.Wait() }
	t.Cleanup(stopped)
	d := w.attach("--pid", fmt.Sprint(program.Process.Pid))
	d.ready()
	w.run("", nil, "ip", "netns", "del", "short")
	// The program is still in it.
	for range 20 {
		if !d.alive() {
			t.Fatalf("it ended although a program uses the namespace\n%s", d.log)
		}
		if _, err := w.command("status", "--pid", fmt.Sprint(d.cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		}
	}
	stopped()
	err := d.wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("it ended with %v, not 4\n%s", err, d.log)
	}
	if !strings.Contains(d.log.String(), "has ended: nobody uses its network any more") {
		t.Errorf("it does not say why it ends:\n%s", d.log)
	}
	if left := w.run("", nil, "ls", "/run/viasocks"); left != "" {
		t.Errorf("these files are left: %s", left)
	}
}

// TestAttachOwn: the own network is not what attach is for, and a namespace is attached to once.
func TestAttachOwn(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, _, _ := container(t)
	for _, tt := range []struct {
		flags []string
		says  string
	}{
		{[]string{"--netns", "host"}, "the network namespace of viasocks itself: use 'viasocks up'"},
		{[]string{"--netns", "nobody"}, "cannot use the network namespace nobody: there is none"},
		{[]string{"--pid", "4194304"}, "cannot use the process 4194304: there is none"},
	} {
		d := w.attach(tt.flags...)
		if err := d.wait(); err == nil || !strings.Contains(d.log.String(), tt.says) {
			t.Errorf("%v: %v, and it says %q, not %q", tt.flags, err, d.log, tt.says)
		}
	}
	d := w.attach("--netns", "ctr")
	d.ready()
	second := w.attach("--netns", "ctr")
	if err := second.wait(); err == nil || !strings.Contains(second.log.String(), "another viasocks does: see 'viasocks ps'") {
		t.Errorf("a second one: %v\n%s", err, second.log)
	}
	if err := w.outgoing("203.0.113.7"); err != nil {
		t.Error("after the second one was refused: ", err)
	}
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
}
