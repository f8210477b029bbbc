package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// swarmSize is the size of the file of a swarm.
const swarmSize = 8 << 20

// swarm is a file, its torrent, and an opentracker.
type swarm struct {
	t                  *testing.T
	dir, data, torrent string
	content            []byte
	hash               [sha1.Size]byte // of the torrent
	tracker            string

	programs []*swarmer
	over     chan struct{} // closed when a program has ended
	once     sync.Once     // closes over
	crashed  bool
}

// inSwarm runs a test in a new swarm. It runs it again if libtorrent has crashed: version 2.0.8 of Debian 12 does so in one of
// some hundred runs, also without viasocks.
func inSwarm(t *testing.T, name, scheme string, f func(s *swarm)) {
	t.Helper()
	for range 3 {
		var s *swarm
		if !t.Run(name, func(t *testing.T) { s = newSwarm(t, scheme); f(s) }) || s == nil || !s.crashed {
			return
		}
	}
	t.Errorf("%s: libtorrent has crashed three times", name)
}

// newSwarm makes a random file and starts its tracker, which the torrent names by the scheme http or udp.
func newSwarm(t *testing.T, scheme string) *swarm {
	t.Helper()
	needPrograms(t, "opentracker", "aria2c")
	s := &swarm{t: t, dir: t.TempDir(), content: make([]byte, swarmSize), over: make(chan struct{}),
		tracker: fmt.Sprintf("%s:%d", world4, freePort(t))}
	s.data, s.torrent = s.sub("data"), filepath.Join(s.dir, "torrent")
	_, _ = rand.Read(s.content) // never fails
	s.write(filepath.Join(s.data, "file"), string(s.content))
	const piece = 256 << 10
	var pieces []byte
	for part := range slices.Chunk(s.content, piece) {
		sum := sha1.Sum(part)
		pieces = append(pieces, sum[:]...)
	}
	info := fmt.Sprintf("d6:lengthi%de4:name4:file12:piece lengthi%de6:pieces%d:%se", swarmSize, piece, len(pieces), pieces)
	s.hash = sha1.Sum([]byte(info))
	announce := scheme + "://" + s.tracker + "/announce"
	s.write(s.torrent, fmt.Sprintf("d8:announce%d:%s4:info%se", len(announce), announce, info))
	startTracker(t, s.tracker, fmt.Sprintf("%x", s.hash))
	return s
}

// sub makes a folder of the swarm.
func (s *swarm) sub(name string) (path string) {
	s.t.Helper()
	path = filepath.Join(s.dir, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *swarm) write(path, text string) {
	s.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// startTracker runs opentracker at an endpoint, by HTTP and UDP, for one torrent.
func startTracker(t *testing.T, at, hash string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		// Debian's opentracker serves only what its whitelist names.
		"whitelist": hash + "\n",
		"conf":      fmt.Sprintf("listen.tcp_udp %s\naccess.whitelist /whitelist\ntracker.rootdir %s\ntracker.user nobody\n", at, dir),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, at, "opentracker", "-f", filepath.Join(dir, "conf"))
}

// withoutPlus is a query for opentracker, to which a plus does not mean a space.
func withoutPlus(query string) string { return strings.ReplaceAll(query, "+", "%20") }

// announced asks the tracker for its peers, as a peer at other4.
func (s *swarm) announced() (peers []netip.AddrPort) {
	s.t.Helper()
	var answer string
	for _, event := range []string{"stopped", "started"} { // opentracker forgets who has stopped, and names nobody to it
		q := url.Values{"info_hash": {string(s.hash[:])}, "peer_id": {strings.Repeat("q", 20)}, "port": {"9"}, "left": {"1"},
			"uploaded": {"0"}, "downloaded": {"0"}, "compact": {"1"}, "event": {event}}
		answer = s.ask("/announce?" + withoutPlus(q.Encode()))
	}
	_, list, _ := strings.Cut(answer, "5:peers")
	length, list, _ := strings.Cut(list, ":")
	n, err := strconv.Atoi(length)
	if err != nil || n%6 != 0 || n > len(list) {
		s.t.Fatalf("the tracker answers %q", answer)
	}
	for p := range slices.Chunk([]byte(list[:n]), 6) {
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte(p)), binary.BigEndian.Uint16(p[4:]))
		if at != netip.AddrPortFrom(netip.MustParseAddr(other4), 9) {
			peers = append(peers, at)
		}
	}
	return peers
}

// ask asks the tracker by HTTP, from other4.
func (s *swarm) ask(path string) string {
	s.t.Helper()
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(other4)}}
	c := http.Client{
		Timeout:   testkit.Patience,
		Transport: &http.Transport{DialContext: from.DialContext, DisableKeepAlives: true},
	}
	resp, err := c.Get("http://" + s.tracker + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// await waits until the tracker lists the seeder where peers reach it, and returns where. It may be listed nowhere else.
func (s *swarm) await(p *swarmer) (outer netip.AddrPort) {
	s.t.Helper()
	var got []netip.AddrPort
	if !s.until(func() bool {
		outer, got = p.outer(), s.announced()
		return slices.Contains(got, outer)
	}) {
		s.t.Fatalf("the tracker lists %v, want %v", got, outer)
	}
	if len(got) != 1 {
		s.t.Errorf("the tracker lists %v, want %v alone", got, outer)
	}
	return outer
}

// leech downloads the file with a program to which nobody can connect: dante does not connect to its address.
func (s *swarm) leech() (took time.Duration) {
	s.t.Helper()
	dir := s.sub("got")
	ctx, cancel := context.WithTimeout(s.t.Context(), 4*testkit.Patience)
	defer cancel()
	go func() {
		select {
		case <-s.over:
			cancel()
		case <-ctx.Done():
		}
	}()
	cmd := exec.CommandContext(ctx, "aria2c", "--no-conf", "--dir="+dir, "--interface="+other4, "--enable-dht=false",
		"--bt-enable-lpd=false", "--enable-peer-exchange=false", "--seed-time=0", "--allow-overwrite=true", "--quiet",
		// Without its DHT it asks no UDP tracker.
		"--bt-tracker=http://"+s.tracker+"/announce", "--listen-port="+fmt.Sprint(freePort(s.t)), s.torrent)
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		s.checkPrograms()
		s.t.Fatalf("the leecher: %v: %s", err, out)
	}
	took = time.Since(began)
	s.checkFile(dir)
	return took
}

// checkFile compares the file that was downloaded to dir.
func (s *swarm) checkFile(dir string) {
	s.t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, "file"))
	if err != nil || sha256.Sum256(got) != sha256.Sum256(s.content) || !bytes.Equal(got, s.content) {
		s.t.Errorf("the file is another one: %d bytes, %v", len(got), err)
	}
}

// swarmer is a program with a torrent, and the viasocks that carries it, if any.
type swarmer struct {
	s    *swarm
	cmd  *exec.Cmd
	log  harness.Log
	gone chan struct{} // closed when it has ended
}

// behind runs a program behind viasocks.
func (s *swarm) behind(flags []string, program ...string) *swarmer {
	s.t.Helper()
	return s.start(slices.Concat([]string{viasocks, "run", "--log-level", "info"}, flags, []string{"--"}, program)...)
}

// start runs a program until the test is over.
func (s *swarm) start(program ...string) *swarmer {
	s.t.Helper()
	p := &swarmer{s: s, cmd: exec.Command(program[0], program[1:]...), gone: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.programs = append(s.programs, p)
	go func() {
		_ = p.cmd.Wait()
		close(p.gone)
		s.once.Do(func() { close(s.over) })
	}()
	s.t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(testkit.Patience, func() { _ = p.cmd.Process.Kill() })
		<-p.gone
		late.Stop()
		if s.t.Failed() {
			s.t.Logf("%v said:\n%s", program, harness.Tail(p.log.String(), 60))
		}
	})
	return p
}

// crashed reports whether the program has ended by a signal that no test sends. viasocks adds 128 to it.
func (p *swarmer) crashed() bool {
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	sig := status.Signal()
	if status.Exited() {
		sig = syscall.Signal(status.ExitStatus() - 128)
	}
	return sig == syscall.SIGSEGV || sig == syscall.SIGABRT || sig == syscall.SIGBUS
}

// checkPrograms ends the test if one of its programs has ended, as skipped if that was a crash of libtorrent.
func (s *swarm) checkPrograms() {
	s.t.Helper()
	for _, p := range s.programs {
		select {
		case <-p.gone:
		default:
			continue
		}
		onLibtorrent := slices.Contains(p.cmd.Args, systemPython) || slices.Contains(p.cmd.Args, "qbittorrent-nox")
		if s.crashed = onLibtorrent && p.crashed(); s.crashed {
			s.t.Skipf("libtorrent has crashed (%v): %v\n%s", p.cmd.ProcessState, p.cmd.Args, harness.Tail(p.log.String(), 60))
		}
		s.t.Fatalf("a program has ended (%v): %v", p.cmd.ProcessState, p.cmd.Args)
	}
}

// until waits for a condition, at most until a program ends.
func (s *swarm) until(ok func() bool) (met bool) {
	s.t.Helper()
	testkit.Until(2*testkit.Patience, func() bool {
		if met = ok(); !met {
			s.checkPrograms()
		}
		return met
	})
	return met
}

// says waits for a line with what, and returns the text after it.
func (p *swarmer) says(what string) (rest string) {
	p.s.t.Helper()
	if !p.s.until(func() (ok bool) {
		_, rest, ok = strings.Cut(p.log.String(), what)
		return ok && strings.Contains(rest, "\n")
	}) {
		p.s.t.Fatalf("%v does not say %q", p.cmd.Args, what)
	}
	rest, _, _ = strings.Cut(rest, "\n")
	return rest
}

// status asks the viasocks of the program.
func (p *swarmer) status() (s control.Status) {
	p.s.t.Helper()
	var err error
	if !p.s.until(func() bool {
		var b []byte
		if b, err = exec.Command(viasocks, "status", "--json", "--pid", strconv.Itoa(p.cmd.Process.Pid)).Output(); err == nil {
			err = json.Unmarshal(b, &s)
		}
		return err == nil
	}) {
		p.s.t.Fatalf("status: %v", err)
	}
	return s
}

// outer waits until peers can reach the program, and returns where.
func (p *swarmer) outer() (at netip.AddrPort) {
	p.s.t.Helper()
	// Until viasocks listens for status, there is an error. Transmission first waits 8 s for answers of UPnP.
	p.says("peers can connect to the program")
	if !p.s.until(func() bool {
		l := p.status().Listening
		if l == nil || len(l.Ports) == 0 || l.Ports[0].Outer == "" {
			return false
		}
		at = netip.MustParseAddrPort(l.Ports[0].Outer)
		return true
	}) {
		p.s.t.Fatal("status names no port")
	}
	return at
}

// servedAll lets the file be downloaded, and checks in status that it went to peers that came from outside.
func (p *swarmer) servedAll() {
	p.s.t.Helper()
	before := p.status()
	took := p.s.leech()
	s := p.status()
	came, bytes := s.Listening.Accepted-before.Listening.Accepted, s.Up-before.Up
	if came == 0 || bytes < swarmSize {
		p.s.t.Errorf("%d peers were accepted and %d bytes went to them", came, bytes)
	}
	p.s.t.Logf("%d bytes went through %d connections of peers, in %v", bytes, came, took.Round(time.Millisecond))
}
