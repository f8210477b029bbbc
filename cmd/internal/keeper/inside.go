package keeper

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun/netns"
)

// name is the first argument of a keeper. The second one is the number of its socket.
const name = "viasocks-keeper"

// fresh is how old the last beat may be for the data plane to count as alive.
const fresh = 5 * time.Second

// MainIfKeeper must be called at the start of main. In a keeper it does the keeper's work and does not return.
func MainIfKeeper() {
	if len(os.Args) != 3 || os.Args[1] != name {
		return
	}
	sock, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return
	}
	if domain, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return
	}
	unix.CloseOnExec(sock)
	// Who stops all processes of a service or of a terminal means attach, which tells us what to do.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	conn, err := connOf(os.NewFile(uintptr(sock), "attach"))
	if err != nil {
		os.Exit(1)
	}
	in := &inside{conn: conn, requests: make(chan request), mend: newMender()}
	in.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: &in.level}))
	in.live()
	in.close()
	os.Exit(0)
}

// inside is a keeper.
type inside struct {
	conn     *net.UnixConn
	requests chan request // closed when attach is gone
	log      *slog.Logger
	level    slog.LevelVar

	order *Order
	lock  *control.Lock
	host  *kernel.Host
	stop  func() // ends what watch started; nil: it was not started
	mend  *mender
	last  atomic.Int64 // time of the last beat, in ns of the clock that stops in sleep
}

// live answers requests until it is told to end, or attach is gone.
func (in *inside) live() {
	go func() {
		defer close(in.requests)
		for {
			var r request
			files, err := receive(in.conn, &r)
			closeAll(files)
			if err != nil {
				return
			}
			in.requests <- r
		}
	}()
	for {
		select {
		case r, ok := <-in.requests:
			if !ok {
				if in.host != nil {
					in.log.Warn("viasocks has died: the namespace stays closed: 'viasocks attach' takes over, " +
						"'viasocks down' with the same name opens it")
				}
				return
			}
			if r.Op == opBeat {
				in.beat()
				continue
			}
			if in.answer(r) {
				return
			}
		case <-in.mend.news:
			in.tend()
		case <-in.mend.again:
			in.tend()
		}
	}
}

// answer does what is asked for and answers. last: there is nothing more to do.
func (in *inside) answer(r request) (last bool) {
	var a answer
	var files []*os.File
	var err error
	switch r.Op {
	case opOpen:
		a.Opened, files, err = in.open(r.Order)
	case opSteer:
		err = in.steer()
	case opLook:
		a.State, err = in.look()
	case opUndo:
		err, last = in.undo(), true
	case opLeave:
		last = true
	case opClean:
		a.Removed, err = in.clean(r.Order)
		last = true
	default:
		err = errors.New("cannot do " + strconv.Quote(string(r.Op)))
	}
	if err != nil {
		a.Err = err.Error()
		a.Taken = errors.Is(err, control.ErrLocked) || errors.Is(err, kernel.ErrRunning)
	}
	if last {
		in.close() // before the answer, so that whoever comes next finds the locks free
	}
	if err := send(in.conn, a, files...); err != nil && !last {
		in.log.Debug("cannot answer", "err", err)
	}
	// Only attach holds the TUN from here on: if it dies, the filter notices that nobody reads.
	closeAll(files)
	return last
}

// open closes the namespace when it is called first, and makes the TUN or takes the one that is there.
func (in *inside) open(o *Order) (out Opened, files []*os.File, err error) {
	if in.host == nil {
		if err := in.shut(o); err != nil {
			return out, nil, err
		}
		if in.host.Recovered() {
			out.Reset, err = in.host.ResetStale()
			if err != nil {
				in.log.Warn("cannot look for connections of the dead viasocks", "err", err)
			}
		}
	}
	out.Recovered = in.host.Recovered()
	if files, err = in.openTUN(&out); err != nil {
		if !in.host.Recovered() && in.stop == nil {
			err = errors.Join(err, in.undo())
		}
		return out, nil, err
	}
	return out, files, nil
}

// shut takes the locks and closes the namespace. On error it leaves it as it was.
func (in *inside) shut(o *Order) error {
	if o == nil {
		return errors.New("cannot steer the namespace: there is no order")
	}
	in.order = o
	in.level.Set(o.LogLevel)
	path, err := control.Path(o.Kernel.Dir)
	if err != nil {
		return err
	}
	if in.lock, err = control.TakeHost(path); err != nil {
		return err
	}
	if err := areFree(o.Taken); err != nil {
		return err
	}
	c := o.Kernel
	c.Log, c.Alive = in.log, in.alive
	if c.Kept, err = kernel.Established(); err != nil {
		return err
	}
	if in.host, err = kernel.New(c); err != nil {
		return err
	}
	in.beat()
	if err := in.host.Shut(); err != nil {
		if !in.host.Recovered() {
			err = errors.Join(err, in.host.Open())
		}
		return err
	}
	return nil
}

// areFree checks that no device has an address in one of the networks, except a TUN of ours.
func areFree(networks []netip.Prefix) error {
	list, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range list {
		addrs, err := i.Addrs()
		if err != nil {
			return err
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || p.IsSingleIP() && (p.Addr() == flow.TUN4 || p.Addr() == flow.TUN6) {
				continue
			}
			for _, n := range networks {
				if n.Overlaps(p) {
					return fmt.Errorf(
						"cannot steer the namespace: its device %s has the address %s, inside %s, which viasocks uses itself",
						i.Name, p, n)
				}
			}
		}
	}
	return nil
}

// clean undoes what a dead keeper has left.
func (in *inside) clean(o *Order) ([]string, error) {
	if o == nil || in.host != nil {
		return nil, errors.New("cannot restore the namespace: it is in use")
	}
	in.level.Set(o.LogLevel)
	path, err := control.Path(o.Kernel.Dir)
	if err != nil {
		return nil, err
	}
	if in.lock, err = control.TakeHost(path); err != nil {
		return nil, err
	}
	if err := privsock.RemoveUnused(path); err != nil {
		return nil, fmt.Errorf("cannot remove %s: %w", path, err)
	}
	c := o.Kernel
	c.Log = in.log
	return kernel.Undo(c)
}

// openTUN makes the TUN. The files are its queues and a sock_diag socket.
func (in *inside) openTUN(out *Opened) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	o := in.order
	files, out.Name, err = netns.OpenTUN(o.TUN)
	if err != nil {
		return files, err
	}
	out.Queues = len(files)
	if out.IPv6, err = netns.Configure(out.Name, o.TUN.MTU, o.Addrs, false); err != nil {
		return files, err
	}
	link, err := net.InterfaceByName(out.Name)
	if err != nil {
		return files, err
	}
	out.Index = link.Index
	diag, err := netns.OpenDiagFile()
	if err != nil {
		return files, err
	}
	files = append(files, diag)
	addrs := o.Addrs
	if !out.IPv6 {
		addrs = only4(addrs)
	}
	in.mend.use(netns.Wanted{Index: out.Index, Name: out.Name, MTU: o.TUN.MTU, Addrs: addrs})
	return files, nil
}

// steer adds the rules and routes, and begins to restore what others remove.
func (in *inside) steer() error {
	if in.host == nil {
		return errors.New("cannot steer the namespace: it is not closed")
	}
	if err := in.host.Steer(); err != nil {
		return err
	}
	in.beat()
	if in.stop == nil {
		in.stop = in.watch()
	}
	return nil
}

// undo restores the namespace.
func (in *inside) undo() error {
	if in.host == nil {
		return nil
	}
	in.unwatch()
	return errors.Join(in.host.Unsteer(), in.host.Open())
}

// close releases the locks. It may be called twice.
func (in *inside) close() {
	in.unwatch()
	if in.host != nil {
		in.host.Close()
		in.host = nil
	}
	if in.lock != nil {
		in.lock.Close()
		in.lock = nil
	}
}

// look returns the state for status.
func (in *inside) look() (s State, err error) {
	if in.host == nil {
		return s, nil
	}
	s.Lost = in.mend.lost
	s.Fault, s.Warnings, s.Private = in.mend.fault, in.host.Warnings(), in.host.PrivateDirect()
	s.Refused, err = in.host.Counters()
	s.Refused = slices.DeleteFunc(s.Refused, func(c kernel.Counter) bool { return c.Packets == 0 })
	return s, err
}

func (in *inside) beat() { in.last.Store(now()) }

func (in *inside) alive() bool { return now()-in.last.Load() < int64(fresh) }

func now() int64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) != nil {
		return 0
	}
	return t.Nano()
}
