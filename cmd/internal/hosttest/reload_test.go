package hosttest

import (
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// TestReloadOfTheSameFile: SIGHUP with a file that did not change changes nothing: no rule, no line of the filter, no open
// connection, no mapping; and what is opened afterwards is carried as before.
func TestReloadOfTheSameFile(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	serve(w.listen("world", ":77"), echo)
	answers := w.packets("world", "203.0.113.9:79")
	go func() {
		b := make([]byte, 2048)
		for _, from, err := answers.ReadFrom(b); err == nil; _, from, err = answers.ReadFrom(b) {
			_, _ = answers.WriteTo([]byte(from.String()), from)
		}
	}()
	w.proxy(proxy4 + ":1080")
	w.configure("proxy socks5://" + proxy4)
	d := w.up("--config", configFile)
	from := w.packets("host", "0.0.0.0:0")
	seenFrom := func(when string) (seen string) {
		t.Helper()
		b := make([]byte, 100)
		w.eventually(20*time.Second, when+": UDP is answered", func() bool {
			_, _ = from.WriteToUDPAddrPort([]byte("who am I"), netipAddrPort("203.0.113.9", 79))
			_ = from.SetReadDeadline(time.Now().Add(time.Second))
			n, _, err := from.ReadFrom(b)
			seen = string(b[:n])
			return err == nil
		})
		return seen
	}
	open, err := w.dial("host", netipAddrPort("203.0.113.7", 77))
	if err == nil {
		err = exchange(open, 1000)
	}
	if err != nil {
		t.Fatal(err)
	}
	mapped := seenFrom("before")
	for range 3 {
		before, installed := *ask[control.Status](w, "status").ReadyAt, w.installed()
		d.reload()
		w.eventually(
			20*time.Second,
			"the status tells of the reload",
			func() bool { return ask[control.Status](w, "status").Reloaded != nil },
		)
		if s := ask[control.Status](w, "status"); len(s.Warnings) > 0 || !s.ReadyAt.Equal(before) {
			t.Errorf("the status changed: %+v", s)
		}
		if after := w.installed(); !reflect.DeepEqual(after, installed) {
			t.Errorf("before: %v\nafter: %v", installed, after)
		}
		if err := exchange(open, 1000); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		if now := seenFrom("after"); now != mapped {
			t.Errorf("the mapping was at %s and is at %s", mapped, now)
		}
		from2 := w.packets("host", "0.0.0.0:0")
		from, from2 = from2, from
		seenFrom("a new socket, after the reload")
		from = from2
		if c, err := w.dial("host", netipAddrPort("203.0.113.8", 77)); err != nil || exchange(c, 1000) != nil {
			t.Errorf("a new connection after the reload: %v", err)
		}
	}
	if n := strings.Count(d.log.String(), "level=WARN"); n > 0 {
		t.Errorf("%d warnings", n)
	}
	d.signal(syscall.SIGTERM)
	if err := d.wait(); err != nil {
		t.Error(err)
	}
}
