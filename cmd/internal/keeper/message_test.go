package keeper

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/kernel"
)

// pair returns both ends of a connection.
func pair(t *testing.T) (k *Keeper, in *inside) {
	t.Helper()
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	other, err := connOf(theirs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return &Keeper{conn: ours}, &inside{conn: other}
}

// An order with full lists arrives as it was, and files do.
func TestMessages(t *testing.T) {
	k, in := pair(t)
	o := Order{Kernel: kernel.Config{TUN: "viasocks0", Marks: kernel.MarksFrom(0x76000000, 0xff000000)}}
	for i := range 256 {
		p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(i)}), 128)
		o.Kernel.Exclude.Networks = append(o.Kernel.Exclude.Networks, p)
		o.Kernel.Exclude.Cgroups = append(o.Kernel.Exclude.Cgroups, strings.Repeat("c", 250))
	}
	if err := send(k.conn, request{opOpen, &o}); err != nil {
		t.Fatal(err)
	}
	var r request
	if _, err := receive(in.conn, &r); err != nil {
		t.Fatal(err)
	}
	if r.Op != opOpen || !reflect.DeepEqual(*r.Order, o) {
		t.Errorf("%+v arrived", r)
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := answer{
		Opened: Opened{Name: "viasocks0", Queues: 1},
		State:  State{Refused: []kernel.Counter{{Reason: "a", Packets: 1}}},
	}
	if err := send(in.conn, want, f, f); err != nil {
		t.Fatal(err)
	}
	got, files, err := k.ask(request{Op: opLook}, time.Minute)
	defer closeAll(files)
	if err != nil || len(files) != 2 || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v with %d files arrived, %v", got, len(files), err)
	}
}

// What the answer says of a failure is the error.
func TestAnswers(t *testing.T) {
	for _, tt := range []struct {
		a    answer
		want error
		says string
	}{
		{answer{Err: "cannot x: y"}, nil, "cannot x: y"},
		{answer{Err: "locked", Taken: true}, ErrTaken, "'viasocks down' with the same name"},
	} {
		k, in := pair(t)
		if err := send(in.conn, tt.a); err != nil {
			t.Fatal(err)
		}
		if err := k.Steer(); err == nil || !strings.Contains(err.Error(), tt.says) || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%+v: %v", tt.a, err)
		}
	}
	k, in := pair(t)
	in.conn.Close()
	if err := k.Steer(); !errors.Is(err, ErrGone) {
		t.Errorf("without a keeper: %v", err)
	}
	// A late answer is not taken for that of the next request.
	k, in = pair(t)
	if _, _, err := k.ask(request{Op: opLook}, time.Millisecond); err == nil {
		t.Error("an answer came from nobody")
	}
	if err := send(in.conn, answer{}); err != nil {
		t.Fatal(err)
	}
	if err := k.Steer(); err == nil {
		t.Error("a late answer counts for the next request")
	}
}

// Messages that are too long or malformed are errors, and the end of the other side is.
func TestMalformed(t *testing.T) {
	k, in := pair(t)
	if err := send(k.conn, strings.Repeat("x", maxMessage)); err == nil {
		t.Error("a message that is too long was sent")
	}
	for _, text := range []string{"{", strings.Repeat("x", maxMessage+1)} {
		if _, err := k.conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		var r request
		if _, err := receive(in.conn, &r); err == nil {
			t.Errorf("%.10q was taken", text)
		}
	}
	k.conn.Close()
	var r request
	if _, err := receive(in.conn, &r); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}
