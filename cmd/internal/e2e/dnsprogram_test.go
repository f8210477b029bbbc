package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// nameServer answers DNS over TCP by what answer says, one question after the other.
func nameServer(t *testing.T, host string, answer func(q []byte) []byte) netip.AddrPort {
	l, addr := listenTCP(t, host)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for {
					var n uint16
					if binary.Read(c, binary.BigEndian, &n) != nil {
						return
					}
					q := make([]byte, n)
					if _, err := io.ReadFull(c, q); err != nil {
						return
					}
					a := answer(q)
					c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
				}
			}()
		}
	}()
	return addr
}

// runProgram is what a program prints under viasocks run, and how it ends.
func runProgram(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*testkit.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, viasocks, append([]string{"run"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

const muslProgram = `
#include <netdb.h>
#include <stdio.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *all, *a;
	int err = getaddrinfo(argv[1], "80", &hints, &all), n = 0;
	if (err) { puts(gai_strerror(err)); return 1; }
	for (a = all; a; a = a->ai_next) n++;
	printf("%d addresses\n", n);
	return 0;
}
`

// TestMuslProgram: musl 1.2.3 asks by UDP, takes 512 bytes and never comes back by TCP. A name with more addresses than that
// has those that fit, behind a chain of CNAMEs too.
func TestMuslProgram(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	gcc, err := exec.LookPath("musl-gcc")
	if err != nil {
		t.Skip("musl-gcc is not installed: scripts/deps.sh test")
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "resolve")
	cc := exec.Command(gcc, "-static", "-o", bin, "-x", "c", "-")
	cc.Stdin = strings.NewReader(muslProgram)
	if out, err := cc.CombinedOutput(); err != nil {
		t.Fatalf("cannot compile: %v\n%s", err, out)
	}
	server := nameServer(t, world4, func(q []byte) []byte {
		end := 12
		for q[end] != 0 {
			end += 1 + int(q[end])
		}
		a := bytes.Clone(q[:end+5])
		a[2], a[3], a[11] = 0x81, 0x80, 0
		count := byte(0)
		if q[end+2] == 1 { // an A record is asked for
			owner := []byte{0xC0, 12}
			if bytes.Contains(bytes.ToLower(q), []byte("chain")) {
				long := []byte("\x1d-a-very-long-name-of-a-cdn-1-\x07example\x03net\x00")
				for i := range byte(3) {
					a = append(append(a, owner...), 0, 5, 0, 1, 0, 0, 0, 60, 0, byte(len(long)))
					long[1] = 'a' + i
					owner = []byte{0xC0 | byte(len(a)>>8), byte(len(a))}
					a = append(a, long...)
					count++
				}
			}
			for i := range byte(40) {
				a = append(append(a, owner...), 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, i)
				count++
			}
		}
		a[7] = count
		return a
	})
	proxy := listenSOCKS(t)
	for name, want := range map[string]string{"many.example": "30 addresses\n", "chain.example": "19 addresses\n"} {
		out, err := runProgram(t, "", "--proxy", proxy.URL(), "--dns", "tcp://"+server.String(), "--", bin, name)
		if err != nil || out != want {
			t.Errorf("%s: %v, %q, want %q", name, err, out, want)
		}
	}
}

// TestNsupdate: an UPDATE sent by UDP reaches the server that it was sent to.
func TestNsupdate(t *testing.T) {
	needWorld(t)
	if _, err := exec.LookPath("nsupdate"); err != nil {
		t.Skip("nsupdate is not installed: scripts/deps.sh test")
	}
	resolver := nameServer(t, world4, answerRefused)
	updates := make(chan []byte, 8)
	master := nameServer(t, other4, func(q []byte) []byte {
		if q[2]>>3&15 == 5 {
			updates <- q
		}
		a := bytes.Clone(q)
		a[2] |= 0x80
		return a
	})
	proxy := listenSOCKS(t)
	asked := netip.MustParseAddrPort("198.51.100.53:53")
	proxy.Redirect(asked, master)
	out, err := runProgram(t, "server 198.51.100.53\nzone example.\nupdate add new.example. 300 A 192.0.2.44\nsend\n",
		"--proxy", proxy.URL(), "--dns", "tcp://"+resolver.String(), "--", "nsupdate")
	if err != nil || out != "" {
		t.Errorf("nsupdate: %v\n%s", err, out)
	}
	select {
	case u := <-updates:
		if !bytes.Contains(u, []byte{192, 0, 2, 44}) {
			t.Errorf("the server got %x", u)
		}
	default:
		t.Error("the server got no UPDATE")
	}
	for _, r := range proxy.Requests() {
		if got := netip.AddrPortFrom(r.Dst.IP, r.Dst.Port); got != asked {
			t.Errorf("the proxy was asked for %v", got)
		}
	}
}

func answerRefused(q []byte) []byte {
	a := bytes.Clone(q)
	a[2] |= 0x80
	a[3] = a[3]&0xF0 | 5
	return a
}
