package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// With no room for a journal the host is not touched, and nothing is left; what a killed one left is undone all the same.
func TestFullDisk(t *testing.T) {
	h := newHost(t)
	before := h.state()
	full := func(args ...string) string {
		sh := `mount -t tmpfs -o size=16k,mode=755 none /run && mkdir /run/viasocks && { cat /dev/zero >/run/full 2>&-; "$@"; c=$?; ls /run/viasocks; exit $c; }`
		cmd := h.viasocks(args...)
		at := slices.Index(cmd.Args, h.name) + 1
		cmd.Args = slices.Insert(cmd.Args, at, "sh", "-c", sh, "sh")
		return result(t, cmd)
	}
	got := full("up", "--proxy", h.proxy)
	oneLine(t, got)
	if !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(got, "no space left on device (the host is as it was)") {
		t.Error(got)
	}
	h.same("up", before)
	p := h.up("--proxy", h.proxy)
	p.cmd.Process.Kill()
	p.wait()
	if got := full("down"); !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, "nftables table inet viasocks\n") {
		t.Error(got)
	}
	h.result("down") // the journal that was left where there is room
	h.same("down", before)
}

// A terminal that was stopped, or a pager, reads no log: the host is carried and given back all the same.
func TestLogNotRead(t *testing.T) {
	h := newHost(t)
	before := h.state()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for w.SetWriteDeadline(time.Now().Add(time.Second)) == nil { // until it is full
		if _, err := w.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	cmd := h.viasocks("up", "--proxy", h.proxy, "--log-level", "debug")
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if !testkit.Until(testkit.Patience, func() bool { return strings.Contains(h.result("status"), ": ready") }) {
		t.Fatal("it is not ready")
	}
	if got := h.result("down"); !strings.HasPrefix(got, "exit 0\n") {
		t.Error(got)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	h.same("down", before)
}
