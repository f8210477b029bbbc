package daemon

import (
	"context"
	"log/slog"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// A status that is asked for while a reload begins or ends the ports contains both halves of them or none.
func TestStatusWhileThePortsChange(t *testing.T) {
	testkit.CheckLeaks(t)
	ours, theirs := tuntest.Pipe(1500, tun.VnetHdr)
	defer theirs.Close()
	with := parse(t, "--proxy", "socks5://127.0.0.1:1", "--forwarded-port", "192.0.2.1:6881/tcp")
	without := parse(t, "--proxy", "socks5://127.0.0.1:1")
	p, err := newPlane(with, ours, nil, dialing{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithCancel(context.Background())
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() {
		for ctx.Err() == nil {
			var s control.Status
			p.fillListening(&s)
			if s.Listening != nil && len(s.Listening.Forwarded) != 1 {
				t.Errorf("the status has %d forwarded ports", len(s.Listening.Forwarded))
			}
		}
	})
	p.listen(with, nil, tunAddress)
	for range 2000 {
		p.relisten(without, nil)
		p.relisten(with, nil)
	}
}
