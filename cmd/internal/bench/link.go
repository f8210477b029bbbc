package main

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/tun/netns"
)

// linkMain is a slow or lossy link between two network namespaces, for kernels without netem: a TUN in each, and this
// process between them, which passes each packet on after a delay, or drops it. Without loss the packets are
// super-segments, so that the link is not a bottleneck; with loss each has the size of the MTU, as on a wire.
func linkMain(args []string) error {
	fs := flag.NewFlagSet("link", flag.ExitOnError)
	name := fs.String("name", "slow0", "interface, in both namespaces")
	a := fs.String("a", "", "one namespace: path,address/length")
	b := fs.String("b", "", "the other")
	delay := fs.Duration("delay", 0, "each way")
	loss := fs.Float64("loss", 0, "percent of packets that are dropped, each way")
	fs.Parse(args)
	if *delay < 0 || *delay > time.Second || *loss < 0 || *loss > 50 {
		return errors.New("--delay takes 0 to 1s, --loss 0 to 50")
	}
	var ends [2]*os.File
	for i, spec := range []string{*a, *b} {
		f, err := openEnd(spec, *name, *loss == 0)
		if err != nil {
			return err
		}
		defer f.Close()
		ends[i] = f
	}
	fmt.Println("ready")
	failed := make(chan error, 2)
	go func() { failed <- carry(ends[0], ends[1], *delay, *loss) }()
	go func() { failed <- carry(ends[1], ends[0], *delay, *loss) }()
	return <-failed
}

// openEnd makes the TUN of one end. The thread stays in its namespace and ends with the goroutine.
func openEnd(spec, name string, super bool) (*os.File, error) {
	type opened struct {
		f   *os.File
		err error
	}
	c := make(chan opened)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread has left the process's namespace
		f, err := openEndHere(spec, name, super)
		c <- opened{f, err}
	}()
	o := <-c
	return o.f, o.err
}

func openEndHere(spec, name string, super bool) (*os.File, error) {
	var path, addr string
	for i := range spec {
		if spec[i] == ',' {
			path, addr = spec[:i], spec[i+1:]
		}
	}
	prefix, err := netip.ParsePrefix(addr)
	if err != nil {
		return nil, fmt.Errorf("an end is path,address/length: %w", err)
	}
	ns, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("cannot enter %s: %w", path, err)
	}
	fs, _, err := netns.OpenTUN(netns.TUNOptions{Name: name, MTU: 1500, VnetHdr: true})
	if err != nil {
		return nil, err
	}
	f := fs[0]
	offload := 0
	if super {
		offload = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	}
	rc, err := f.SyscallConn()
	if err == nil {
		cerr := rc.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offload) })
		err = errors.Join(cerr, err)
	}
	if err == nil {
		_, err = netns.Configure(name, 1500, []netip.Prefix{prefix}, false)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// linkBytes limits what is in transit in one direction: 25 ms of 16 Gbit/s.
const linkBytes = 50 << 20

type late struct {
	due   time.Time
	frame []byte
}

// carry moves frames from one end to the other.
func carry(from, to *os.File, delay time.Duration, loss float64) error {
	queue := make(chan late, 32<<10)
	var queued atomic.Int64
	go func() {
		for l := range queue {
			time.Sleep(time.Until(l.due))
			_, _ = to.Write(l.frame)
			queued.Add(-int64(len(l.frame)))
		}
	}()
	defer close(queue)
	buf := make([]byte, 1<<17)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return err
		}
		if loss > 0 && rand.Float64()*100 < loss || queued.Load() > linkBytes {
			continue
		}
		queued.Add(int64(n))
		select {
		case queue <- late{time.Now().Add(delay), append([]byte(nil), buf[:n]...)}:
		default:
			queued.Add(-int64(n))
		}
	}
}
