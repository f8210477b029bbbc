package hosttest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestAttachTUNDeleted: a TUN that another program deletes in the container is made again while status, metrics and a capture
// are asked for all the time. With the race detector, viasocks has it, too.
func TestAttachTUNDeleted(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, proxy := container(t)
	before := w.stateOf("ctr")
	const socket = "/run/attach-metrics.sock"
	d := w.attach("--netns", "ctr", "--metrics", "unix:"+socket)
	d.ready()
	rec.take()
	scrape := func() (string, error) { return metricsAt(socket) }
	var asked atomic.Int64
	end, over := make(chan struct{}), sync.WaitGroup{}
	stop := sync.OnceFunc(func() { close(end); over.Wait() })
	t.Cleanup(stop)
	for _, ask := range []func() error{
		func() error { _, err := scrape(); return err },
		func() error { _, err := w.command("status"); return err },
		func() error { _, err := w.command("capture", "--time", "100ms", "-"); return err },
	} {
		over.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				if err := ask(); err == nil {
					asked.Add(1)
				}
				testkit.Pace(10 * time.Millisecond)
			}
		})
	}
	for i := 1; i <= 3; i++ {
		w.ip("ctr", "link del "+tunName)
		w.eventually(2*time.Minute, "the data plane works again", func() bool {
			return strings.Count(d.log.String(), "the data plane works again") >= i || !d.alive()
		})
		n := len(proxy.Requests())
		if err := w.outgoing("203.0.113.7"); err != nil || len(proxy.Requests()) == n {
			t.Errorf("deleted %d times: %v, and the proxy had %d requests more", i, err, len(proxy.Requests())-n)
		}
	}
	if asked.Load() == 0 {
		t.Error("nobody was answered")
	}
	stop()
	if text, err := scrape(); err != nil || !strings.Contains(text, "viasocks_") {
		t.Errorf("metrics: %v\n%s", err, text)
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	w.restored("detached", "ctr", before)
}

// metricsAt reads the metrics at a unix socket.
func metricsAt(socket string) (string, error) {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	r, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get("http://viasocks/metrics")
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, r.Body); err != nil {
		return "", err
	}
	if r.StatusCode != http.StatusOK {
		return "", errors.New(r.Status)
	}
	return b.String(), nil
}
