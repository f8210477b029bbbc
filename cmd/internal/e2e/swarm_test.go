package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// seedTracker is a tracker that names the seeders to the leechers, and nobody to the seeders: these are only reached.
type seedTracker struct {
	mu    sync.Mutex
	seeds map[string]netip.AddrPort // by peer_id
}

func (s *seedTracker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := r.URL.Query()
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	port, portErr := strconv.ParseUint(q.Get("port"), 10, 16)
	if err != nil || portErr != nil {
		http.Error(w, "no peer", http.StatusBadRequest)
		return
	}
	var peers []byte
	at := netip.AddrPortFrom(from.Addr().Unmap(), uint16(port))
	if q.Get("left") == "0" {
		if s.seeds[q.Get("peer_id")] = at; q.Get("event") == "stopped" {
			delete(s.seeds, q.Get("peer_id"))
		}
	} else {
		for _, seed := range s.seeds {
			peers = binary.BigEndian.AppendUint16(append(peers, seed.Addr().AsSlice()...), seed.Port())
		}
	}
	fmt.Fprintf(w, "d8:intervali2e12:min intervali2e5:peers%d:%se", len(peers), peers)
}

// lists reports whether the tracker knows the seeder at.
func (s *seedTracker) lists(at netip.AddrPort) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seed := range s.seeds {
		if seed == at {
			return true
		}
	}
	return false
}

// TestSwarm: Transmission behind viasocks maps its port by NAT-PMP and announces the port that dante has given, which is
// another one than its own. A leecher that nobody knows downloads the whole file from it.
func TestSwarm(t *testing.T) {
	url := binding(t)
	needPrograms(t, "transmission-daemon", "transmission-create", "aria2c")
	const size = 8 << 20
	dir := t.TempDir()
	for _, sub := range []string{"data", "watch", "config", "got"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	content := make([]byte, size)
	_, _ = rand.Read(content)
	if err := os.WriteFile(filepath.Join(dir, "data", "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	tracker := &seedTracker{seeds: map[string]netip.AddrPort{}}
	l, at := listenTCP(t, world4)
	srv := &http.Server{Handler: tracker, ReadHeaderTimeout: testkit.Patience}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	torrent := filepath.Join(dir, "torrent")
	if out, err := exec.Command("transmission-create", "-o", torrent, "-t", fmt.Sprintf("http://%v/announce", at),
		filepath.Join(dir, "data", "file")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	taken, own := listenTCP(t, world4) // so that dante gives another port
	defer taken.Close()
	seeder := startSeeder(t, url, dir, torrent, own.Port())
	var outer netip.AddrPort
	// Transmission first waits 8 s for answers of UPnP.
	testkit.Eventually(t, "a port for the seeder", func() bool {
		s, err := statusOf(seeder.Process.Pid)
		if err != nil || s.Listening == nil || len(s.Listening.Ports) == 0 || s.Listening.Ports[0].Outer == "" {
			return false
		}
		outer = netip.MustParseAddrPort(s.Listening.Ports[0].Outer)
		return true
	})
	testkit.Eventually(t, "its announcement", func() bool { return tracker.lists(outer) })
	if outer.Port() == own.Port() {
		t.Errorf("the seeder announces %v, and its own port is %d", outer, own.Port())
	}
	took := leech(t, dir, torrent, content)
	s, err := statusOf(seeder.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if s.Listening.Accepted == 0 || s.Up < size {
		t.Errorf("%d peers were accepted and %d bytes went to them", s.Listening.Accepted, s.Up)
	}
	t.Logf("%d bytes went through %d connections of peers to %v, in %v", s.Up, s.Listening.Accepted, outer, took)
}

// leech downloads the torrent with a program that nobody knows, and checks the file.
func leech(t *testing.T, dir, torrent string, content []byte) (took time.Duration) {
	t.Helper()
	cmd := exec.Command("aria2c", "--no-conf", "--dir="+filepath.Join(dir, "got"), "--interface="+other4, "--enable-dht=false",
		"--bt-enable-lpd=false", "--enable-peer-exchange=false", "--seed-time=0", "--allow-overwrite=true", "--quiet",
		"--listen-port="+fmt.Sprint(freePort(t)), torrent)
	timer := time.AfterFunc(4*testkit.Patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("the leecher: %v: %s", err, out)
	}
	took = time.Since(began)
	got, err := os.ReadFile(filepath.Join(dir, "got", "file"))
	if err != nil || sha256.Sum256(got) != sha256.Sum256(content) || !bytes.Equal(got, content) {
		t.Errorf("the file is another one: %d bytes, %v", len(got), err)
	}
	return took
}

// startSeeder runs transmission-daemon, which seeds torrent and asks for its port by NAT-PMP.
func startSeeder(t *testing.T, url, dir, torrent string, port uint16) *exec.Cmd {
	t.Helper()
	settings, err := json.Marshal(map[string]any{
		"port-forwarding-enabled": true, "peer-port": port, "dht-enabled": false, "utp-enabled": false, "lpd-enabled": false,
		"pex-enabled": false, "rpc-enabled": false, "watch-dir": filepath.Join(dir, "watch"), "watch-dir-enabled": true,
		"download-dir": filepath.Join(dir, "data"), "incomplete-dir-enabled": false, "message-level": 3,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config", "settings.json"), settings, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(torrent)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "watch", "it.torrent"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	log := &harness.Log{}
	cmd := exec.Command(viasocks, "run", "--proxy", url, "--log-level", "info", "--listen", "auto", "--",
		"transmission-daemon", "--foreground", "--config-dir", filepath.Join(dir, "config"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(testkit.Patience, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		late.Stop()
		if t.Failed() {
			t.Logf("the seeder said:\n%s", harness.Tail(log.String(), 60))
		}
	})
	return cmd
}

// statusOf asks the viasocks with that process id.
func statusOf(pid int) (s control.Status, err error) {
	b, err := exec.Command(viasocks, "status", "--json", "--pid", strconv.Itoa(pid)).Output()
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}
