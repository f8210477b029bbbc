package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestFakeTracker: aria2 announces itself by UDP to a tracker that it knows by name, and takes the answer, which must come from
// the fake address that it asked: it then connects to the peer that the tracker knows. It also works behind a proxy that refuses
// port 53.
func TestFakeTracker(t *testing.T) {
	t.Parallel()
	for name, rules := range map[string][]string{"with-resolver": nil, "port-53-refused": {noDNS}} {
		t.Run(name, func(t *testing.T) {
			if apart(t) {
				testFakeTracker(t, rules...)
			}
		})
	}
}

func testFakeTracker(t *testing.T, rules ...string) {
	t.Helper()
	needPrograms(t, "danted", "dnsmasq", "opentracker", "aria2c")
	const at, port = "127.0.0.1:1081", "6969"
	hash, log := strings.Repeat("c3", 20), filepath.Join(t.TempDir(), "log")
	dir := t.TempDir()
	startTracker(t, world4+":"+port, hash)
	dnsmasq(t, "--address=/tracker.example/"+world4)
	dante(t, at, rules...)
	// A peer that the tracker knows: Debian's opentracker takes the address that an announcement comes from.
	peer, peerAt := listenTCP(t, world4)
	binaryHash := strings.Repeat("\xc3", 20)
	get := func(path string) string {
		resp, err := (&http.Client{Timeout: testkit.Patience}).Get("http://" + world4 + ":" + port + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	_ = get(fmt.Sprintf("/announce?info_hash=%s&peer_id=%s&port=%d&uploaded=0&downloaded=0&left=1",
		withoutPlus(url.QueryEscape(binaryHash)), strings.Repeat("p", 20), peerAt.Port()))
	reached := make(chan struct{})
	go func() {
		if c, err := peer.Accept(); err == nil {
			c.Close()
			close(reached)
		}
	}()
	// aria2 asks UDP trackers from the socket of its DHT, and not at all without it. It runs until there is a file.
	ended, over := make(chan ran, 1), filepath.Join(dir, "over")
	until := `aria2c "$@" & while kill -0 $! && ! [ -e ` + over + ` ]; do sleep 0.1; done; kill $!; wait $!`
	go func() {
		flags := []string{"--proxy", "socks5://" + at, "--dns", "fake,tcp://" + world4}
		ended <- run(t, flags, "sh", "-c", until, "sh", "--no-conf",
			"--dir="+dir, "--enable-dht=true", "--dht-file-path="+filepath.Join(dir, "dht"), "--log="+log, "--log-level=info",
			"magnet:?xt=urn:btih:"+hash+"&tr="+url.QueryEscape("udp://tracker.example:"+port+"/announce"))
	}()
	select {
	case <-reached:
	case <-time.After(testkit.Patience):
		t.Errorf("the peer was not reached; the tracker knows %q",
			get("/scrape?info_hash="+withoutPlus(url.QueryEscape(binaryHash))))
	}
	if err := os.WriteFile(over, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := <-ended
	said, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"received CONNECT reply from 198.18.", "received ANNOUNCE reply from 198.18."} {
		if !strings.Contains(string(said), what) {
			t.Errorf("aria2 does not say %q", what)
		}
	}
	if t.Failed() {
		t.Logf("aria2 printed %s%s and logged\n%s", r.out, r.stderr, harness.Tail(string(said), 60))
	}
}
