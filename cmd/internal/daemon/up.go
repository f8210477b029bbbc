package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// Up steers the whole host through the proxy until SIGTERM, SIGINT or SIGHUP, and then undoes it. The error is ErrDied
// when it had been ready.
func Up(cfg *config.Config, stderr *os.File) error {
	e, err := newEnv(cfg, stderr)
	if err != nil {
		return err
	}
	defer e.close()
	e.warn(cfg)
	if err := needNetAdmin(); err != nil {
		return err
	}
	moreFiles()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx, cancel := startContext(signals)
	defer cancel()

	dial := markedDialing(cfg.Mark)
	if err := probe(ctx, cfg, dial); err != nil {
		return err
	}
	dev, index, err := openTUN(cfg, e)
	if err != nil {
		return err
	}
	diag, err := netns.OpenDiag()
	if err != nil {
		dev.Close()
		return err
	}
	defer diag.Close()
	diag.SetInterface(index)
	p, err := newPlane(cfg, dev, diagSockets{diag}, dial, e.log)
	if err != nil {
		return err
	}
	p.start()
	steering, err := kernel.Steer(kernel.Options{TUN: cfg.TUN, Table: cfg.Table, Mark: cfg.Mark, Mask: cfg.Mask, Log: e.log})
	if err != nil {
		stop(p, nil)
		return err
	}
	unsteer := func() (err error) {
		// The app's flows are reset first: their retransmissions would go to the real peers once the rules are gone.
		stop(p, func() { err = steering.Close() })
		return err
	}
	// Once more, with the rules in place: what they cut off is better given back at once.
	if err := probe(ctx, cfg, dial); err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("cannot steer the host, it is as it was: the rules cut the proxy off: %w (rp_filter=1 on the way to it does that)", err)
		}
		return errors.Join(err, unsteer())
	}
	var failure error
	e.log.Info("ready", "tun", cfg.TUN, "proxy", proxyName(cfg))
	select {
	case <-ctx.Done():
		e.log.Info("stopping", "why", context.Cause(ctx))
	case err := <-p.failed:
		failure = died(err)
	}
	if err := unsteer(); err != nil {
		failure = errors.Join(failure, died(err))
	}
	return failure
}

func openTUN(cfg *config.Config, e *env) (tun.Device, int, error) {
	f, name, err := netns.OpenTUN(netns.TUNOptions{Name: cfg.TUN, MTU: cfg.MTU, VnetHdr: cfg.Offload != tun.OffloadOff})
	if err != nil {
		return nil, 0, err
	}
	if err := netns.Configure(name, cfg.MTU, tunAddrs, false); err != nil {
		f.Close()
		return nil, 0, err
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("cannot find the TUN device again: %w", err)
	}
	dev, err := tun.FromFile(f, tun.Options{MTU: cfg.MTU, Offload: cfg.Offload, Log: e.log})
	return dev, link.Index, err
}

// needNetAdmin tells beforehand, and once, what would fail at each step.
func needNetAdmin() error {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0 {
		return nil // where it can't be asked the kernel will say
	}
	return errors.New("cannot steer the host: CAP_NET_ADMIN is missing: run it as root, or use 'viasocks run' for one program")
}

// moreFiles raises the limit of open files as far as we may: a flow holds one, a UDP mapping two. (The runtime raises
// it to the hard limit only.)
func moreFiles() {
	const enough = 1 << 20
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Max < enough {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: enough, Max: enough})
	}
}
