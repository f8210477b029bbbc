package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/netns"
)

// RunOptions are the arguments of Run besides the configuration.
type RunOptions struct {
	Environ               []string
	Stdin, Stdout, Stderr *os.File
	Version               string
}

// Run runs cfg.Program in its own network namespace and carries its traffic until the program ends. exit is the
// program's own status, 126 or 127 with an error if it could not be started, or 0 with an error if nothing was
// started. The error is ErrDied if the data plane failed while the program ran; the program is ended then.
//
// Our sockets stay in the caller's namespace, so a proxy on 127.0.0.1 is reached. The limit of open files needs no
// attention here: the runtime raises it to the hard limit for us, and restores it for the program.
func Run(cfg *config.Config, o RunOptions) (exit int, err error) {
	e, err := newEnv(cfg, o.Stderr)
	if err != nil {
		return 0, err
	}
	defer e.close()
	e.warn(cfg)

	// INT and QUIT come from the terminal and also reach the program, which decides what to do. We catch them instead
	// of ignoring them, because the program would inherit that.
	forward := heeded(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	ending := heeded(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT)
	theirs := make(chan os.Signal, 1)
	signal.Notify(theirs, heeded(syscall.SIGINT, syscall.SIGQUIT)...)
	defer signal.Stop(theirs)
	// Before the program runs, they end us like the other signals.
	early := make(chan os.Signal, 4)
	signal.Notify(early, ending...)
	ctx, cancel := startContext(early)
	defer cancel()

	dial, err := e.beforeRun(ctx, cfg)
	if err != nil {
		return 0, err
	}
	child, err := spawn(ctx, cfg, o, e.log)
	if err != nil {
		return 0, err
	}
	defer child.Close()
	p, err := runPlane(cfg, child, dial, e.log)
	if err != nil {
		return 0, err
	}
	defer stop(p, nil)
	p.start()
	if !child.IPv6 {
		e.log.Info("the namespace has no IPv6: the program has IPv4 only")
	}
	forwarded := make(chan os.Signal, 16)
	signal.Notify(forwarded, forward...)
	defer signal.Stop(forwarded)
	signal.Stop(early) // no signal is lost in between: one that came until now ends us, a later one goes to the program
	if err := cancel(); err != nil {
		return 0, err
	}
	unserve, err := serveProgram(cfg, p, child, o, e.log)
	if err != nil {
		return 0, err
	}
	defer unserve()
	if err := child.Exec(); err != nil {
		return 0, err
	}
	network := newSettling()
	defer followNetwork(network, e.log)()
	e.log.Info("ready", "tun", child.TUNName, "proxy", proxyName(cfg), "program", cfg.Program[0])
	return watch(child, p, network, forwarded)
}

// beforeRun tests the proxy, and opens what must not fail once the program runs.
func (e *env) beforeRun(ctx context.Context, cfg *config.Config) (d dialing, err error) {
	if err := e.openDecisions(cfg); err != nil {
		return d, err
	}
	pool, err := newPool(cfg, e.log)
	if err != nil {
		return d, err
	}
	d = dialing{decisions: e.decisionsTo(), pool: pool, absent: newAbsent(e.log)}
	if err := probe(ctx, cfg, d); err != nil {
		return d, err
	}
	return d, process.KeepReadyFD(cfg.ReadyFD)
}

// spawn makes the program's namespace and the helper that becomes the program.
func spawn(ctx context.Context, cfg *config.Config, o RunOptions, log *slog.Logger) (*netns.Child, error) {
	return netns.Spawn(ctx, netns.Spec{
		Argv: cfg.Program, Env: userEnv(programEnv(o.Environ, cfg.KeepProxyEnv), cfg.RunAs),
		Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr,
		TUN:        netns.TUNOptions{MTU: cfg.MTU, VnetHdr: true, Queues: tun.Queues},
		Addrs:      tunAddrs,
		Gateway:    gatewayOf(cfg),
		Nameserver: nameservers(cfg),
		Search:     cfg.Search,
		DotsAsIs:   cfg.Fake.On,
		Local:      outsideAddrs(cfg),
		Host:       hostEntry(cfg),
		User:       userOf(cfg),
		Named:      cfg.NetNS,
		Sockets:    len(cfg.Publish) > 0,
		// The shell that started us must notice when the program stops.
		FollowStops: true,
		Log:         log,
	})
}

// runPlane makes the data plane of the program.
func runPlane(cfg *config.Config, child *netns.Child, dial dialing, log *slog.Logger) (*plane, error) {
	dev, err := tun.FromFiles(child.TUN, tun.Options{MTU: cfg.MTU, Offload: cfg.Offload, Log: log})
	if err != nil {
		return nil, err
	}
	sockets, err := lookups(cfg, child, log)
	if err != nil {
		return nil, err
	}
	dial.noIPv6 = !child.IPv6
	return newPlane(cfg, dev, sockets, dial, log)
}

// lookups returns what looks up the program's sockets, or nil if that is not possible and no rule needs it.
func lookups(cfg *config.Config, child *netns.Child, log *slog.Logger) (flow.Sockets, error) {
	if child.Diag != nil {
		return diagSockets{child.Diag, nil}, nil
	}
	if slices.ContainsFunc(cfg.Rules, func(r route.Rule) bool { return r.AsksOwner() }) {
		return nil, fmt.Errorf(
			"cannot use rules with user, cgroup or exe: the program's sockets can't be looked at: %w",
			child.DiagErr,
		)
	}
	log.Warn("cannot look up the program's sockets: mappings end by timeout only", "err", child.DiagErr)
	return nil, nil
}

// serveProgram serves everything besides the data plane: published ports, the control socket, metrics, and the
// announcement that the program has its network. end stops all of it.
func serveProgram(cfg *config.Config, p *plane, child *netns.Child, o RunOptions, log *slog.Logger) (end func(), err error) {
	var ends []func()
	endAll := func() {
		for _, f := range slices.Backward(ends) {
			f()
		}
	}
	defer func() {
		if err != nil {
			endAll()
		}
	}()
	published, err := startPublishing(cfg, child, log)
	if err != nil {
		return nil, err
	}
	if published != nil {
		ends = append(ends, published.Close)
	}
	p.listen(cfg, o.Environ, tunAddress)
	ends = append(ends, p.unlisten)
	ends = append(ends, serveRun(cfg, p, instance{child.Pid(), child.TUNName, published}, o, log))
	endMetrics, err := serveMetrics(cfg, watched{
		plane: func() *plane { return p }, ready: func() bool { return true }, dropped: child.TXDropped,
	}, o.Version, log)
	if err != nil {
		return nil, err
	}
	ends = append(ends, endMetrics)
	unannounce, err := process.Announce(cfg.PIDFile, cfg.ReadyFD)
	if err != nil {
		return nil, err
	}
	ends = append(ends, unannounce)
	return endAll, nil
}

// heeded returns the signals except those that our caller has ignored: nohup's HUP, or the INT of a shell's
// background job. They stay ignored, here and for the program. It must be called before Notify, which changes this.
func heeded(signals ...os.Signal) []os.Signal {
	return slices.DeleteFunc(signals, signal.Ignored)
}

// watch waits for the program, passes signals to it, follows the network, and ends the program if the data plane
// fails.
func watch(child *netns.Child, p *plane, network *settling, signals <-chan os.Signal) (int, error) {
	type end struct {
		exit int
		err  error
	}
	ended := make(chan end, 1)
	go func() {
		exit, err := child.Wait()
		ended <- end{exit, err}
	}()
	var failure error
	var kill <-chan time.Time
	passed := map[os.Signal]bool{}
	for {
		select {
		case e := <-ended:
			if failure != nil {
				return 0, died(failure)
			}
			if sig, core := child.EndedBy(); e.err == nil && !passed[sig] {
				tellSignal(p.log, sig, core)
			}
			return e.exit, e.err
		case s := <-signals:
			passed[s] = true
			child.Signal(s)
		case <-network.news:
			network.noted()
		case <-network.due:
			p.networkChanged(network)
		case failure = <-p.failed:
			p.log.Error("the program's network failed: the program is ended", "err", failure)
			child.Signal(syscall.SIGTERM)
			kill = time.After(killAfter)
		case <-kill:
			child.Signal(syscall.SIGKILL)
		}
	}
}
