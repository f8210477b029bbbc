package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/handover"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// This is the part of the new process in `viasocks up --takeover`; package handover describes the conversation.

const (
	// frameRoom is the send buffer of a socket for frames in bytes: as much as the kernel's queues of the device hold.
	frameRoom = 4 << 20
	// newsWithin is how long the old process may say nothing. It reports several times a second.
	newsWithin = 30 * time.Second
)

// predecessor is the viasocks from which this one takes the host over.
type predecessor struct {
	talk  *handover.New
	owned bool // the host is ours

	frames    *stack.Elsewhere // nil: not taken yet
	following sync.WaitGroup   // followPredecessor, until end
	over      chan struct{}    // closed when it has ended; nil: not taken yet
	stop      atomic.Bool      // it shall reset its flows and end
}

// callPredecessor asks the viasocks at the control socket to hand over. It returns nil without an error if none is up.
func callPredecessor(cfg *config.Config, path string) (*predecessor, error) {
	c, err := control.TakeOver(path)
	if errors.Is(err, control.ErrNoDaemon) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	talk, err := handover.Take(c)
	if err != nil {
		return nil, err
	}
	p := &predecessor{talk: talk}
	if err := talk.Differ(takeoverSettings(cfg)); err != nil {
		p.end()
		return nil, err
	}
	return p, nil
}

// takeoverSettings are the options that both processes must share, because they name what is on the host.
func takeoverSettings(cfg *config.Config) map[string]string {
	return map[string]string{
		"tun": cfg.TUN, "mtu": strconv.Itoa(cfg.MTU), "offload": cfg.Offload.String(),
		"mark": fmt.Sprintf("%#x/%#x", cfg.Mark, cfg.Mask), "table": strconv.Itoa(cfg.Table),
		"priority": strconv.Itoa(cfg.Host.Priority), "nft-table": cfg.Host.NFTable,
		"fail-open": strconv.FormatBool(cfg.Host.FailOpen),
	}
}

// startedUs reports whether the predecessor has started this process for an upgrade. p may be nil.
func (p *predecessor) startedUs() bool { return p != nil && p.talk.Offer.Heir == os.Getpid() }

// holds reports whether the predecessor still has the host.
func (p *predecessor) holds() bool { return p != nil && !p.owned }

// end ends the conversation. The predecessor keeps the host, or ends its flows if it has already given the host up.
func (p *predecessor) end() {
	if p == nil {
		return
	}
	p.talk.End()
	p.following.Wait()
	p.talk.Files.Close()
}

// finish makes the predecessor reset its flows and end, and waits for that. The host can be opened only afterwards:
// until then, the programs' retransmissions would go to the real peers.
func (p *predecessor) finish(log *slog.Logger) {
	if p == nil || p.over == nil {
		return
	}
	p.stop.Store(true) // it learns this with its next report
	select {
	case <-p.over:
	case <-time.After(stopTimeout):
		log.Error("the viasocks before does not end: its connections were not reset", "limit", stopTimeout)
	}
}

// keys returns the flows that the predecessor still has. They are ours, too, when we are taken over from.
func (p *predecessor) keys() []stack.Key {
	if p == nil || p.frames == nil {
		return nil
	}
	return p.frames.Keys()
}

// prepare changes the configuration of route/kernel for a host that is carried until now.
func (p *predecessor) prepare(k *kernel.Config, log *slog.Logger) {
	if p == nil {
		return
	}
	k.Live, k.Lock = true, p.talk.Kernel
	if own := ownName(k); own != p.talk.Offer.Own {
		log.Warn("the filter does not check whose our sockets are, because the two viasocks differ in this",
			"before", p.talk.Offer.Own, "now", own)
		k.OwnCgroup, k.OwnUID = "", nil
	}
}

// ownName describes by what the filter knows our sockets besides the mark.
func ownName(k *kernel.Config) string {
	switch {
	case k.OwnCgroup != "":
		return "control group " + k.OwnCgroup
	case k.OwnUID != nil:
		return "user " + strconv.FormatUint(uint64(*k.OwnUID), 10)
	}
	return "mark"
}

// takeOver takes the place of start. It builds everything first, and then asks the other process to let go.
func (u *up) takeOver(ctx context.Context, h *host) error {
	b := u.before
	p, diag, dev, wanted, err := u.adoptPlane()
	if err != nil {
		return err
	}
	near, far, err := frameSockets(b.talk.Offer.Sources)
	if err != nil {
		diag.Close()
		p.Close()
		return err
	}
	err = b.talk.Commit(far, handover.Terms{Limit: u.first.Host.TakeoverLimit})
	closeFiles(far)
	if err != nil {
		closeFiles(near)
		diag.Close()
		p.Close()
		return err
	}
	// From here on nobody reads the device but us.
	b.owned = true
	u.use(p, diag, dev, wanted)
	taken, names, err := b.talk.Taken()
	if err != nil {
		closeFiles(near)
		return err
	}
	if b.frames, err = stack.NewElsewhere(taken.Keys(), near); err != nil {
		return err
	}
	p.stack.SetElsewhere(b.frames)
	takePool(u.dial.pool, u.first, names, u.log)
	p.start()
	u.lock.Sign()
	u.allowed.also(endpointsOf(taken.Proxies))
	u.allowed.attach(h.setEndpoints)
	if err := h.Shut(); err != nil {
		return err
	}
	if err := u.steer(h); err != nil {
		return err
	}
	if err := u.serve(); err != nil {
		return err
	}
	if err := b.talk.InPlace(); err != nil {
		u.log.Warn("the viasocks before has ended, and its connections with it", "err", err)
	}
	u.listen() // the viasocks before has given its ports back
	b.over = make(chan struct{})
	b.following.Go(func() { defer close(b.over); u.followPredecessor(ctx) })
	u.log.Info("took the host over", "from", b.talk.Offer.PID, "version", b.talk.Offer.Version, "its_flows", taken.Len())
	u.probeTaken(ctx)
	return nil
}

// probeTaken checks the proxy after a takeover. If it does not answer, the host stays ours: viasocks waits for the proxy with
// --wait, and only warns without it.
func (u *up) probeTaken(ctx context.Context) {
	err := probe(ctx, u.first, u.dial)
	switch {
	case err == nil || ctx.Err() != nil:
	case u.first.Host.Wait && mayCome(err):
		u.waitFor(err)
	default:
		u.log.Warn("the proxy does not answer", "err", err)
	}
}

// adoptPlane builds a data plane over the queues of the other process, and starts nothing.
func (u *up) adoptPlane() (p *plane, diag *netns.Diag, dev tun.Device, wanted netns.Wanted, err error) {
	queues := u.before.talk.Queues
	u.before.talk.Queues = nil
	dev, err = tun.Adopt(queues, tun.Options{MTU: u.first.MTU, Offload: u.first.Offload, Log: u.log, OnLink: u.tun.changed})
	if err != nil {
		return nil, nil, nil, wanted, err
	}
	if wanted, err = wantedTUN(u.first, dev.Name()); err == nil {
		diag, err = netns.OpenDiag()
	}
	if err != nil {
		dev.Close()
		return nil, nil, nil, wanted, err
	}
	diag.SetInterface(wanted.Index)
	p, err = newPlane(u.first, dev, diagSockets{diag, &forwarding{dir: "/proc/sys/net"}}, u.dial, u.log)
	if err != nil {
		diag.Close()
		return nil, nil, nil, wanted, err
	}
	return p, diag, dev, wanted, nil
}

// frameSockets returns n pairs of sockets for frames, with our ends in near.
func frameSockets(n int) (near, far []*os.File, err error) {
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			closeFiles(near)
			closeFiles(far)
			return nil, nil, fmt.Errorf("cannot make a socket for frames: %w", err)
		}
		if unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, frameRoom) != nil {
			_ = unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, frameRoom)
		}
		near = append(near, os.NewFile(uintptr(fds[0]), "frames"))
		far = append(far, os.NewFile(uintptr(fds[1]), "frames"))
	}
	return near, far, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// followPredecessor takes note of how the other process's flows end, until it has ended or the conversation was ended.
// ctx tells whether this viasocks is to stop.
func (u *up) followPredecessor(ctx context.Context) {
	b := u.before
	var err error
	var first sync.Once
	for err == nil {
		err = b.talk.Left(newsWithin, func(l handover.Left) (stop bool) {
			first.Do(u.notify.Repeat) // systemd listens to us by now
			b.frames.Ended(l.Ended.Keys())
			u.mu.Lock()
			u.theirs = l.Now
			u.mu.Unlock()
			if l.Proxies != nil {
				u.allowed.also(endpointsOf(l.Proxies))
			}
			return b.stop.Load()
		})
	}
	if p, _ := u.running(); p != nil {
		p.stack.SetElsewhere(nil)
	}
	b.frames.Close()
	b.frames.Ended(b.frames.Keys())
	u.allowed.also(nil)
	u.mu.Lock()
	left := u.theirs
	u.theirs = 0
	u.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, io.EOF) && left == 0:
		u.log.Info("the viasocks before has ended", "lost_frames", b.frames.Lost())
	default:
		u.log.Warn("the viasocks before has ended with flows", "flows", left, "lost_frames", b.frames.Lost(), "err", err)
	}
}

func endpointsOf(all []handover.Endpoint) (out []endpoint) {
	for _, e := range all {
		proto := flow.TCP
		if e.UDP {
			proto = flow.UDP
		}
		out = append(out, endpoint{proto, e.Addr})
	}
	return out
}

func endpointsTo(all []endpoint) (out []handover.Endpoint) {
	for _, e := range all {
		out = append(out, handover.Endpoint{UDP: e.Proto == flow.UDP, Addr: e.Addr})
	}
	return out
}
