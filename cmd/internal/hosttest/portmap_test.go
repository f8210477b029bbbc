package hosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// This file is about programs of the host that ask for ports under `up`: see TestListenAuto for NAT-PMP.

// needClients skips the test unless the clients of port mapping are installed.
func needClients(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed (scripts/deps.sh)", p)
		}
	}
}

// upnpc asks from a namespace. -i: upnpc takes a gateway whose outer address is one for documentation for a disconnected one.
func (w *world) upnpc(ns string, want string, args ...string) {
	w.t.Helper()
	var out string
	testkit.Until(testkit.Patience, func() bool { // it looks for 2 s, in which a machine may stall
		out, _ = try(ns, nil, append([]string{"timeout", "20", "upnpc", "-i"}, args...)...)
		return strings.Contains(out, want) || !strings.Contains(out, noGateway)
	})
	if !strings.Contains(out, want) {
		w.t.Errorf("in %s, upnpc %v says no %q: %s", ns, args, want, out)
	}
}

// noGateway is what upnpc says if nobody answers.
const noGateway = "No IGD UPnP Device found"

// TestListenAutoUPnP: a program of the host finds the gateway by multicast, though the host has a network with a router, and
// gets a port, which works. No search leaves the host, also if the program chooses a device for it. A container finds
// nothing, and gets no port of the host if it knows where the gateway is.
func TestListenAutoUPnP(t *testing.T) {
	if !apart(t) {
		return
	}
	needClients(t, "upnpc")
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", "auto")
	l := w.listen("host", ":6885")
	w.upnpc("host", proxy4+":6885 TCP is redirected to internal "+host4+":6885", "-a", host4, "6885", "6885", "TCP", "600")
	far := w.peer("203.0.113.201")
	w.sendBoth(far, w.acceptFrom(l, far))
	for _, at := range []string{"eth0", hostLAN4, host4} { // IP_MULTICAST_IF
		w.upnpc("host", noGateway, "-m", at, "-s")
	}
	w.upnpc("host", noGateway, "-6", "-s")
	w.upnpc("host", noGateway, "-6", "-m", "eth0", "-s")
	w.upnpc("ctr", noGateway, "-s")
	gateway := "http://198.18.0.2:1900/rootDesc.xml"
	for _, inner := range []string{"198.18.0.1", ctr4} {
		out, _ := try("ctr", nil, "timeout", "5", "upnpc", "-i", "-u", gateway, "-a", inner, "22", "2222", "TCP", "600")
		if strings.Contains(out, "valid IGD") || strings.Contains(out, "is redirected") {
			t.Errorf("the container opens port 22 of the host: %s", out)
		}
	}
	w.upnpc("host", "UPNP_DeletePortMapping() returned : 0", "-d", "6885", "TCP")
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "auto")
}

// TestListenAutoUser: with --include-uid the search of a user who is included is answered, too.
func TestListenAutoUser(t *testing.T) {
	if !apart(t) {
		return
	}
	needClients(t, "upnpc", "setpriv")
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", "auto", "--include-uid", "1000")
	w.eventually(testkit.Patience, "the user that is included finds the gateway", func() bool {
		out, _ := try("host", nil, "setpriv", "--reuid", "1000", "--clear-groups", "timeout", "20", "upnpc", "-i", "-s")
		return strings.Contains(out, "ExternalIPAddress = "+proxy4)
	})
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "included")
}

// TestListenTold: the command of --on-port is told where peers reach the host's port, and natpmpc, upnpc and a client of PCP
// learn the port of --forwarded-port.
func TestListenTold(t *testing.T) {
	if !apart(t) {
		return
	}
	needClients(t, "natpmpc", "upnpc")
	w := newWorld(t)
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	dir := t.TempDir()
	told, hook := filepath.Join(dir, "told"), filepath.Join(dir, "hook")
	script := "#!/bin/sh\n" +
		"echo \"$# $VIASOCKS_LISTEN_PORT/$VIASOCKS_LISTEN_PROTO $VIASOCKS_OUTER_ADDRESS $VIASOCKS_OUTER_PORT\" >>" + told
	if err := os.WriteFile(hook, []byte(script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	d := w.up("--proxy", "socks5://"+proxy4, "--listen", "6881", "--on-port", hook, "--forwarded-port", "203.0.113.77:50000")
	w.eventually(20*time.Second, "the command of --on-port", func() bool {
		b, _ := os.ReadFile(told)
		return string(b) == "0 6881/tcp "+proxy4+" 6881\n"
	})
	out, _ := try("host", nil, "natpmpc", "-g", lanRouter4, "-a", "6885", "6885", "udp", "600")
	if !strings.Contains(out, "Mapped public port 50000 protocol UDP to local port 6885 liftime 120") ||
		!strings.Contains(out, "Public IP address : 203.0.113.77") {
		t.Errorf("natpmpc: %s", out)
	}
	w.upnpc("host", "203.0.113.77:50000 TCP is redirected to internal "+host4+":6886", "-a", host4, "6886", "50000", "TCP")
	if got, want := w.pcpMap(6886), "result 0, port 50000 of 203.0.113.77"; got != want {
		t.Errorf("PCP: %s, want %s", got, want)
	}
	if out, err := w.command("status"); err != nil || !strings.Contains(out,
		"port 50000/udp of 203.0.113.77, told to port 6885 of the program") {
		t.Errorf("status: %v: %s", err, out)
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "told")
}

// pcpMap asks the router of the host's network for a TCP port by PCP (RFC 6887, section 11.1) and says what is answered. The
// host's address for it is that of its answers.
func (w *world) pcpMap(port uint16) string {
	w.t.Helper()
	c := w.packets("host", host4+":0")
	from := addr(host4).As16()
	ask := append([]byte{2, 1, 0, 0, 0, 0, 0, 120}, from[:]...)
	ask = append(ask, make([]byte, 12)...) // the nonce
	ask = append(ask, unix.IPPROTO_TCP, 0, 0, 0, byte(port>>8), byte(port), 0, 0)
	ask = append(ask, make([]byte, 16)...)
	if _, err := c.WriteToUDPAddrPort(ask, netipAddrPort(lanRouter4, 5351)); err != nil {
		w.t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 2048)
	n, _, err := c.ReadFromUDPAddrPort(b)
	if err != nil || n < 60 || b[1] != 0x81 {
		w.t.Fatalf("PCP: %x: %v", b[:n], err)
	}
	return fmt.Sprintf(
		"result %d, port %d of %v",
		b[3],
		binary.BigEndian.Uint16(b[42:]),
		netip.AddrFrom16([16]byte(b[44:60])).Unmap(),
	)
}

// TestListenAutoTransmission: a real BitTorrent client of the host, which knows nothing of viasocks, gets its port from what it
// takes for the router, and a peer connects to it. Nothing of it leaves the host past the proxy.
func TestListenAutoTransmission(t *testing.T) {
	needClients(t, "transmission-daemon")
	t.Parallel()
	t.Run("NAT-PMP", func(t *testing.T) { // its UPnP does not take a gateway whose outer address is one for documentation
		if apart(t) {
			hostTransmission(t, newWorld(t), "forwarded successfully")
		}
	})
	t.Run("UPnP", func(t *testing.T) {
		if !apart(t) {
			return
		}
		w := newWorld(t)
		w.nft("host", "table inet igd { chain out { type filter hook output priority 0; udp dport 5351 drop; }\n}")
		// It is told this address, and sends nothing there.
		hostTransmission(t, w, "Port forwarding successful!", "--forwarded-port", "192.0.1.1:9/udp")
	})
}

// hostTransmission runs Transmission on the host until it says that it has its port, and connects to it as a peer.
func hostTransmission(t *testing.T, w *world, says string, flags ...string) {
	w.binding()
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	d := w.up(append(flags, "--proxy", "socks5://"+proxy4, "--listen", "auto")...)
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	w.start("host", nil, []string{"HOME=" + dir}, "transmission-daemon", "-f", "-g", dir, "-w", dir, "-m", "-O", "-Y",
		"-P", fmt.Sprint(peerPort), "-p", "9091", "-T", "-e", log, "--log-debug")
	w.eventually(2*testkit.Patience, "the port of Transmission", func() bool {
		b, _ := os.ReadFile(log)
		return strings.Contains(string(b), says)
	})
	far := w.peer("203.0.113.201")
	_ = far.SetDeadline(time.Now().Add(20 * time.Second))
	// A handshake for a torrent that it does not have: it closes the connection.
	if _, err := far.Write(append([]byte("\x13BitTorrent protocol"), make([]byte, 48)...)); err != nil {
		t.Fatal(err)
	}
	if n, err := far.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the program answers nothing: %d bytes, %v", n, err)
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "transmission")
}
