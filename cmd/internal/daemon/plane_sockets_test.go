package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestForwarding(t *testing.T) {
	dir := t.TempDir()
	set := func(family, device, value string) {
		t.Helper()
		name := filepath.Join(dir, family, "conf", device, "forwarding")
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, device := range []string{"all", "default", "lo", "eth0"} {
		set("ipv4", device, "0")
		set("ipv6", device, "0")
	}
	f := &forwarding{dir: dir}
	if f.on() {
		t.Error("nothing is forwarded")
	}
	set("ipv4", "eth0", "1")
	if f.on() {
		t.Error("the answer is read anew each time")
	}
	ask := func() bool { f.checked = f.checked.Add(-forwardingAge - time.Second); return f.on() }
	if !ask() {
		t.Error("one device forwards")
	}
	set("ipv4", "eth0", "0")
	set("ipv4", "default", "1") // no device has it yet
	if ask() {
		t.Error("nothing is forwarded any more")
	}
	set("ipv6", "all", "1")
	if !ask() {
		t.Error("IPv6 is forwarded")
	}
	if (*forwarding)(nil).on() {
		t.Error("a namespace of our own forwards")
	}
}
