package doctor

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// serveThere runs `doctor --serve` in the namespace of the proxies, until the test ends.
func serveThere(t *testing.T, at ...string) {
	t.Helper()
	args := append([]string{"--net=" + proxyNetns, viasocks, "doctor", "--serve"}, at...)
	cmd := exec.Command("nsenter", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("doctor --serve: %v", err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.Contains(line, "serving at") {
		t.Fatalf("%q, %v", line, err)
	}
}

// With a far end everything is tested, and nothing is wrong.
func TestPeer(t *testing.T) {
	needWorld(t)
	serveThere(t)
	r := examine(t, "--proxy", "socks5://"+proxyAt(t, nil).Addr().String(), "--peer", there4, "--peer", there6)
	r.onlyFaults(t)
	for _, check := range []string{
		"the far end", "latency", "closed port", "half-close", "reset", "UDP",
		"UDP mapping", "UDP filtering", "UDP size", "UDP, IPv6", "speed",
	} {
		r.is(t, check, OK)
	}
	r.is(t, "the far end", OK, "It sees "+there4+" as the sender")
	r.is(t, "UDP size", OK, "65485 bytes reach the peer, and of 65485 come back", "QUIC")
	six := 0
	for _, f := range r.Findings {
		if f.Check == "IPv6" && f.Level == OK {
			six++
		}
	}
	if six != 1 {
		t.Errorf("IPv6 was not reached:\n%s", r.text)
	}
	if r.Seconds > 15 {
		t.Errorf("it took %v s", r.Seconds)
	}
}

// Two addresses of the far end tell the whole kind of NAT.
func TestPeerOfTwoAddresses(t *testing.T) {
	needWorld(t)
	serveThere(t, there4+":7000", there4b+":7000")
	r := examine(t, "--proxy", "socks5://"+proxyAt(t, nil).Addr().String(), "--peer", there4+":7000", "--peer", there4b+":7000")
	r.is(t, "UDP mapping", OK, "whatever it sends to", "endpoint-independent")
	r.is(t, "UDP filtering", OK, "strangers", "endpoint-independent")
}

// dante passes a reset on only where its rule logs errors: what is said of it is true in both cases, and names the line.
func TestPeerOfDante(t *testing.T) {
	needWorld(t)
	danted, err := exec.LookPath("danted")
	if err != nil {
		t.Skip(err)
	}
	serveThere(t)
	for port, tt := range map[string]struct{ log, found, do string }{
		"1081": {"", "seen as one that ended in order", "'log: error'"},
		"1082": {"log: error", "seen as broken off", ""},
	} {
		dir := t.TempDir()
		conf := filepath.Join(dir, "danted.conf")
		text := "logoutput: " + filepath.Join(dir, "log") + "\ninternal: " + there4 + " port = " + port + "\nexternal: eth0\n" +
			"clientmethod: none\nsocksmethod: none\nclient pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 " + tt.log +
			" }\n"
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("nsenter", "--net="+proxyNetns, danted, "-f", conf, "-p", filepath.Join(dir, "pid"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() })
		testkit.Eventually(t, "dante", func() bool {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(there4, port), time.Second)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		r := examine(t, "--proxy", "socks5://"+net.JoinHostPort(there4, port), "--peer", there4)
		r.is(t, "half-close", OK)
		r.is(t, "reset", OK, tt.found)
		if f := r.find(t, "reset"); tt.do == "" && f.Do != "" || !strings.Contains(f.Do, tt.do) {
			t.Errorf("%q: %+v", tt.log, f)
		}
	}
}

// Faults of a proxy that only a far end shows.
func TestPeerFaults(t *testing.T) {
	needWorld(t)
	serveThere(t)
	with := func(t *testing.T, fault func(sockstest.Request) sockstest.Fault, peer string) result {
		return examine(t, "--proxy", "socks5://"+proxyAt(t, fault).Addr().String(), "--peer", peer)
	}
	t.Run("nobody serves", func(t *testing.T) {
		r := with(t, nil, there4+":9")
		r.is(t, "the far end", Fault, "cannot be reached through the proxy", "doctor --serve")
		r.onlyFaults(t, "the_far_end")
	})
	t.Run("something else answers", func(t *testing.T) {
		r := with(t, nil, deaf(t))
		r.is(t, "the far end", Fault)
	})
	t.Run("datagrams are lost", func(t *testing.T) {
		r := with(t, func(r sockstest.Request) sockstest.Fault {
			return sockstest.Fault{DropUDP: r.Cmd == sockstest.CmdAssociate}
		}, there4)
		r.is(t, "UDP", Fault, "no datagram comes back", "DHT", "firewall")
		r.onlyFaults(t, "UDP")
	})
	t.Run("closed port granted", func(t *testing.T) {
		r := with(t, func(r sockstest.Request) sockstest.Fault {
			if r.Cmd == sockstest.CmdConnect && r.Dst.Port != 7780 {
				return grant(r)
			}
			return sockstest.Fault{}
		}, there4)
		r.is(t, "closed port", Warning, "nobody listens")
	})
}

// The far end says how it is used, takes arguments, and refuses wrong ones.
func TestServeArguments(t *testing.T) {
	needWorld(t)
	for _, tt := range []struct{ args, want string }{
		{"doctor 198.51.100.1:80", "unexpected argument"},
		{"doctor --serve nonsense", "must be ADDRESS:PORT"},
		{"doctor --serve 192.0.2.9:7000", "cannot assign requested address"},
		{"doctor --serve 127.0.0.1:1 127.0.0.2:2", "the same port"},
		{"doctor --peer a --peer b --peer c", "more than two"},
		{"doctor --peer h:0", "the port must be"},
	} {
		cmd := exec.Command(viasocks, strings.Fields(tt.args)...)
		stop := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		out, err := cmd.CombinedOutput()
		stop.Stop()
		if err == nil || !strings.Contains(string(out), tt.want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v: %s", tt.args, err, out)
		}
	}
}
