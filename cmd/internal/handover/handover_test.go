package handover

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// pair returns the two ends of a conversation.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*net.UnixConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends = append(ends, c.(*net.UnixConn))
	}
	return ends[0], ends[1]
}

// pipes returns the reading ends of n pipes whose number can be read from them.
func pipes(t *testing.T, n int) (ends []*os.File) {
	t.Helper()
	for i := range n {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		w.Close()
		ends = append(ends, r)
	}
	return ends
}

func checkPipes(t *testing.T, files []*os.File) {
	t.Helper()
	for i, f := range files {
		if b, err := io.ReadAll(f); err != nil || len(b) != 1 || b[0] != byte(i) {
			t.Errorf("file %d has %v, %v", i, b, err)
		}
		f.Close()
	}
}

var someKeys = []stack.Key{
	{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("203.0.113.1:80")},
	{Proto: flow.UDP, Src: netip.MustParseAddrPort("[2001:db8::1]:6881")},
}

// converse is the old side of TestConversation.
func converse(t *testing.T, c *net.UnixConn, keys []stack.Key, proxies []Endpoint, left []Left) error {
	files := pipes(t, 17)
	o, err := Give(c, Offer{PID: 7, Version: "v1", Settings: map[string]string{"tun": "via0"}, Sources: 3},
		Files{files[:2], files[2], files[3:]})
	closeAll(files)
	if err != nil {
		return err
	}
	defer o.Close()
	sockets, terms, err := o.Commit(3)
	if err != nil || terms.Limit != time.Hour {
		return fmt.Errorf("%v: %w", terms, err)
	}
	checkPipes(t, sockets)
	if err := o.Go(); err != nil {
		return err
	}
	names := pipes(t, 1)
	defer closeAll(names)
	if err := o.Taken(Taken{Flows: FlowsOf(append(keys, keys[0])), Proxies: proxies}, names[0]); err != nil {
		return err
	}
	stop, err := o.Left(left[0])
	stop2, err2 := o.Left(left[1])
	if stop || !stop2 {
		return errors.New("the wish to stop did not arrive")
	}
	return errors.Join(err, err2)
}

// manyKeys is someKeys and n more.
func manyKeys(n int) []stack.Key {
	keys := append([]stack.Key{}, someKeys...)
	for i := range n {
		keys = append(keys, stack.Key{
			Proto: flow.TCP, Src: netip.AddrPortFrom(netip.MustParseAddr("2001:db8::2"), uint16(i)),
			Dst: netip.MustParseAddrPort("[2001:db8:1:2:3:4:5:6]:65535"),
		})
	}
	return keys
}

// differs wants the settings of the other side to be compared with ours.
func differs(t *testing.T, n *New) {
	t.Helper()
	if err := n.Differ(map[string]string{"tun": "via0"}); err != nil {
		t.Error(err)
	}
	if err := n.Differ(map[string]string{"tun": "via1", "mark": "1"}); err == nil ||
		!strings.Contains(err.Error(), `--tun (it is "via0" there, "via1" here)`) ||
		!strings.Contains(err.Error(), "--mark") {
		t.Error(err)
	}
}

// A whole conversation, with many flows: each side gets what the other has sent, files included.
func TestConversation(t *testing.T) {
	testkit.CheckLeaks(t)
	oldEnd, newEnd := pair(t)
	keys := manyKeys(20_000)
	proxies := []Endpoint{{Addr: netip.MustParseAddrPort("192.0.2.1:1080")}}
	left := []Left{{Ended: FlowsOf(keys[:1]), Now: 5, Proxies: proxies}, {Now: 0}}
	oldSide := make(chan error, 1)
	go func() { oldSide <- converse(t, oldEnd, keys, proxies, left) }()
	n, err := Take(newEnd)
	if err != nil {
		t.Fatal(err)
	}
	defer n.End()
	checkPipes(t, slices.Concat(n.Control, []*os.File{n.Kernel}, n.Queues))
	if n.Offer.PID != 7 || n.Offer.Version != "v1" || n.Offer.Sources != 3 {
		t.Errorf("the offer is %+v", n.Offer)
	}
	differs(t, n)
	sockets := pipes(t, 3)
	err = n.Commit(sockets, Terms{time.Hour})
	closeAll(sockets)
	if err != nil {
		t.Fatal(err)
	}
	taken, names, err := n.Taken()
	if err != nil {
		t.Fatal(err)
	}
	checkPipes(t, []*os.File{names})
	if got := taken.Keys(); len(got) != len(keys) || !reflect.DeepEqual(FlowsOf(got), FlowsOf(keys)) ||
		!reflect.DeepEqual(taken.Proxies, proxies) {
		t.Errorf("%d of %d flows, proxies %v", len(got), len(keys), taken.Proxies)
	}
	if err := n.InPlace(); err != nil {
		t.Fatal(err)
	}
	for _, want := range left {
		err := n.Left(time.Minute, func(l Left) (stop bool) {
			if !reflect.DeepEqual(l, want) {
				t.Errorf("%+v is left", l)
			}
			return l.Now == 0
		})
		if err != nil {
			t.Error(err)
		}
	}
	if err := <-oldSide; err != nil {
		t.Error(err)
	}
	if err := n.Left(time.Minute, nil); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

// Each side notices that the other gives up or talks nonsense, and no descriptor is lost.
func TestBadConversation(t *testing.T) {
	testkit.CheckLeaks(t)
	offer := Offer{Protocol: protocol, Sources: 1}
	for name, c := range map[string]struct {
		say  func(c *net.UnixConn) error
		want string
	}{
		"nothing":     {func(*net.UnixConn) error { return nil }, "its log tells why"},
		"half":        {func(c *net.UnixConn) error { _, err := c.Write([]byte{0, 0, 0, 9, '{'}); return err }, "unexpected EOF"},
		"half a head": {func(c *net.UnixConn) error { _, err := c.Write([]byte{0}); return err }, "its log tells why"},
		"too long":    {func(c *net.UnixConn) error { _, err := c.Write([]byte{255, 0, 0, 0, 1}); return err }, "too long"},
		"no JSON":     {func(c *net.UnixConn) error { _, err := c.Write([]byte{0, 0, 0, 1, 'x'}); return err }, "invalid"},
		"no files":    {func(c *net.UnixConn) error { return send(c, offer) }, "incomplete"},
		"other":       {func(c *net.UnixConn) error { return send(c, Offer{Protocol: 99, Version: "v9"}) }, "v9"},
		// It sends Taken where Ready comes now, so that each would wait for the other after the host has changed hands.
		"the first one": {func(c *net.UnixConn) error {
			return sendPipes(t, c, Offer{Protocol: 1, Version: "v1", Sources: 1, Locks: 1}, 3)
		}, "v1 hands over by another protocol"},
		"no sources": {func(c *net.UnixConn) error {
			return sendPipes(t, c, Offer{Protocol: protocol, Locks: 1}, 3)
		}, "incomplete"},
		"many sources": {func(c *net.UnixConn) error {
			return sendPipes(t, c, Offer{Protocol: protocol, Sources: 1 << 30, Locks: 1}, 3)
		}, "incomplete"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			if err := c.say(a); err != nil {
				t.Fatal(err)
			}
			a.Close()
			if _, err := Take(b); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("it is %v", err)
			}
		})
	}
	a, b := pair(t)
	files := pipes(t, 3)
	defer closeAll(files)
	o, err := Give(a, Offer{Sources: 2}, Files{files[:1], files[1], files[2:]})
	if err != nil {
		t.Fatal(err)
	}
	if err := send(b, commit{Terms: Terms{time.Second}}, files[0]); err != nil {
		t.Fatal(err)
	}
	if _, _, err := o.Commit(2); err == nil || !strings.Contains(err.Error(), "1 sockets for 2") {
		t.Errorf("it is %v", err)
	}
	b.Close()
	if err := o.Go(); err == nil {
		t.Error("the new process is gone, and the host would be let go")
	}
	if err := o.Taken(Taken{}, nil); err == nil {
		t.Error("the new process is gone, and nothing was said")
	}
	o.Close()
}

// Who keeps the host is decided by Go: before it, the old process does, and afterwards the new one has it, even if nothing
// more comes.
func TestWhoKeepsTheHost(t *testing.T) {
	testkit.CheckLeaks(t)
	for _, c := range []struct {
		name        string
		old         func(o *Old) error
		commit, end string // what the errors of the new process contain; commit empty: it has the host
	}{
		{"it refuses", func(*Old) error { return nil }, "it stops, or it is busy", ""},
		{"it dies while it lets go", func(o *Old) error { return o.Go() }, "", "has failed while it let go"},
		{"it says nonsense", func(o *Old) error { return errors.Join(o.Go(), send(o.c, 7)) }, "", "has failed while it let go"},
	} {
		t.Run(c.name, func(t *testing.T) {
			oldEnd, newEnd := pair(t)
			files := pipes(t, 3)
			defer closeAll(files)
			oldSide := make(chan error, 1)
			go func() {
				o, err := Give(oldEnd, Offer{Sources: 1}, Files{files[:1], files[1], files[2:]})
				var sockets []*os.File
				if err == nil {
					sockets, _, err = o.Commit(1)
					closeAll(sockets)
				}
				if err == nil {
					err = c.old(o)
				}
				oldSide <- errors.Join(err, o.Close())
			}()
			n, err := Take(newEnd)
			if err != nil {
				t.Fatal(err)
			}
			defer n.End()
			defer n.Files.Close()
			err = n.Commit(files[:1], Terms{time.Second})
			if c.commit == "" && err == nil {
				_, _, err = n.Taken()
			}
			if err == nil || !strings.Contains(err.Error(), c.commit+c.end) {
				t.Errorf("it is %v", err)
			}
			if err := <-oldSide; err != nil {
				t.Error(err)
			}
		})
	}
}

// A refusal arrives with its reason.
func TestRefuse(t *testing.T) {
	testkit.CheckLeaks(t)
	a, b := pair(t)
	if err := Refuse(a, "v1", "another one does"); err != nil {
		t.Fatal(err)
	}
	if _, err := Take(b); err == nil || err.Error() != "cannot take over: another one does" {
		t.Errorf("it is %v", err)
	}
}

func sendPipes(t *testing.T, c *net.UnixConn, o Offer, n int) error {
	files := pipes(t, n)
	defer closeAll(files)
	return send(c, o, files...)
}
