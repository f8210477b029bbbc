package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/privsock"
	"github.com/viasocks/viasocks/cmd/internal/resolved"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun"
)

// revertTimeout limits what `down` does with systemd-resolved.
const revertTimeout = 5 * time.Second

// downTimeout is how long `down` waits for a daemon to stop.
const downTimeout = 30 * time.Second

// askAgain is how long `down` waits for the end of the daemon before it tells it again to stop.
const askAgain = 500 * time.Millisecond

// Down restores the host. It stops the daemon in order if one is alive, and then undoes what is left, by the journal
// or by the marks of our changes. It writes what it did to out.
func Down(cfg *config.Config, environ []string, out io.Writer) error {
	if cfg.AfterService && !opensAfter(cfg, environ) {
		return nil
	}
	if err := needNetAdmin("restore the host", ""); err != nil {
		return err
	}
	path, err := control.Path(cfg.StateDir)
	if err != nil {
		return err
	}
	if cfg.AfterService && control.Locked(path) {
		fmt.Fprintln(out, "another viasocks has taken over: nothing is undone")
		return nil
	}
	if control.Locked(path) {
		if err := stopDaemon(path); err != nil {
			return err
		}
		fmt.Fprintln(out, "viasocks has stopped")
	}
	lock, err := takeHost(path) // so that no daemon starts while we undo
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := privsock.RemoveUnused(path); err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
	}
	if left, err := forgetMetrics(path); err != nil {
		return fmt.Errorf("cannot remove the metrics socket: %w", err)
	} else if left != "" {
		fmt.Fprintln(out, "metrics socket "+control.Plain(left))
	}
	if line := revertResolved(kernel.LeftTUN(kernelConfig(cfg, nil))); line != "" {
		fmt.Fprintln(out, line)
	}
	lines, err := kernel.Undo(kernelConfig(cfg, nil))
	for _, l := range lines {
		fmt.Fprintln(out, control.Plain(l))
	}
	return err
}

// tellsResolved reports whether `up` tells systemd-resolved to ask viasocks. With --dns off and relay, its own
// servers must be asked.
func tellsResolved(cfg *config.Config) bool {
	return cfg.Host.Resolved && !cfg.DNSOff && (cfg.Fake.On || !cfg.Relay)
}

// revertResolved undoes what a killed viasocks has set in systemd-resolved for the TUN device, and returns a line
// about it. Deleting the device would have the same effect, but we may not delete a device that is not ours.
func revertResolved(device string) string {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), revertTimeout)
	defer cancel()
	switch done, err := resolved.Revert(ctx, resolved.SystemBus(), link.Index, []netip.Addr{nameserver}); {
	case err != nil:
		return "cannot undo the settings in systemd-resolved: " + control.Plain(
			err.Error(),
		) + ": restart it if names are not found"
	case done:
		return "name servers of " + control.Plain(device) + " in systemd-resolved"
	}
	return ""
}

// stopDaemon asks the daemon to stop and waits until it has stopped.
func stopDaemon(path string) error {
	c := control.NewClient(path)
	defer c.Close()
	// A daemon that starts has no socket yet, and one that stops no longer has one. A daemon that hands the host over ends when
	// it is told to stop, but the new one has not heard it and must be told as well.
	var told error
	for end := time.Now().Add(downTimeout); ; {
		told = c.Down()
		if err := c.Wait(askAgain); err == nil {
			return nil
		}
		if time.Now().After(end) {
			break
		}
	}
	if told != nil {
		return fmt.Errorf("%w: end its process, then 'viasocks down' again", told)
	}
	return fmt.Errorf("cannot stop viasocks: it did not end within %v", downTimeout)
}

// opensAfter decides for ExecStopPost of systemd.service(5): a failed service is undone if it may fail open. A
// stopped service has done itself what was needed.
func opensAfter(cfg *config.Config, environ []string) bool {
	for _, e := range environ {
		if result, ok := strings.CutPrefix(e, "SERVICE_RESULT="); ok {
			return result != "success" && cfg.Host.FailOpen
		}
	}
	return false
}

// Shut closes the host as Up does, and returns: nothing except what Up lets pass leaves until Up or Down. The TUN
// stays, so that answers to connections from outside find their way.
func Shut(cfg *config.Config, stderr *os.File) error {
	e, err := newEnv(cfg, stderr)
	if err != nil {
		return err
	}
	defer e.close()
	e.warn(cfg)
	_, lock, _, err := alone(cfg)
	if err != nil {
		return err
	}
	defer lock.Close()
	closed := *cfg
	closed.Host.FailOpen = false // nothing has failed: the host is closed until Up or Down
	h, err := newHost(&closed, nil, nil, nil, e.log)
	if err != nil {
		return err
	}
	defer h.Close()
	err = h.Shut()
	if err == nil {
		var dev tun.Device
		if dev, _, err = openTUN(cfg, e, true, nil); err == nil {
			defer dev.Close()
			err = errors.Join(h.Steer(), h.Unguard())
		}
	}
	if err != nil && !h.Recovered() {
		err = errors.Join(err, h.Unsteer(), h.Open())
	}
	return err
}

// DryRun writes every change that Up would make to the host.
func DryRun(cfg *config.Config, out io.Writer, stderr *os.File) error {
	e, err := newEnv(cfg, stderr)
	if err != nil {
		return err
	}
	defer e.close()
	e.warn(cfg)
	allowed := newEndpoints(e.log)
	allowed.configure(cfg.Upstreams)
	k := kernelConfig(cfg, e.log)
	k.Upstreams = kernelEndpoints(allowed.list())
	h, err := kernel.New(k)
	if err != nil {
		return err
	}
	defer h.Close()
	plan, err := h.Plan()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), revertTimeout)
	defer cancel()
	if tellsResolved(cfg) && resolved.Running(ctx, resolved.SystemBus()) {
		plan = append(
			plan,
			fmt.Sprintf("resolvectl dns %s %s", cfg.TUN, nameserver),
			fmt.Sprintf("resolvectl domain %s '~.'", cfg.TUN),
		)
	}
	for _, l := range plan {
		if _, err := fmt.Fprintln(out, control.Plain(l)); err != nil {
			return err
		}
	}
	return nil
}
