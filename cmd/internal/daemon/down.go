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
	"github.com/viasocks/viasocks/cmd/internal/resolved"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun"
)

// revertTimeout bounds what `down` has to say to systemd-resolved.
const revertTimeout = 5 * time.Second

// downTimeout is how long `down` waits for a daemon to stop.
const downTimeout = 30 * time.Second

// Down gives the host back: it has the daemon stop in order, if one lives, and then undoes what is left, by the journal or
// by what is known to be ours. What it did is written to out.
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
	if control.Locked(path) {
		if err := stopDaemon(path); err != nil {
			return err
		}
		fmt.Fprintln(out, "viasocks has stopped")
	}
	lock, err := control.TakeHost(path) // nobody comes up while we undo
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := control.RemoveStale(path); err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
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

// tellsResolved reports whether `up` tells systemd-resolved to ask viasocks. With --dns off and relay the servers that it has are
// those to be asked.
func tellsResolved(cfg *config.Config) bool {
	return cfg.Host.Resolved && !cfg.DNSOff && (cfg.Fake.On || !cfg.Relay)
}

// revertResolved takes back what a viasocks that was killed has told systemd-resolved of the TUN device, and says so. That would
// forget it with the device, too; but where the device is not ours to delete, this is the only way.
func revertResolved(device string) string {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), revertTimeout)
	defer cancel()
	switch done, err := resolved.Revert(ctx, resolved.SystemBus(), link.Index, []netip.Addr{nameserver}); {
	case err != nil:
		return "cannot take back what systemd-resolved was told: " + control.Plain(err.Error()) + ": restart it if names are not found"
	case done:
		return "name servers of " + control.Plain(device) + " in systemd-resolved"
	}
	return ""
}

// stopDaemon asks the daemon to stop and waits until it has.
func stopDaemon(path string) error {
	c := control.NewClient(path)
	defer c.Close()
	// One that starts has no socket yet, one that stops has none any more.
	for end := time.Now().Add(downTimeout); ; time.Sleep(50 * time.Millisecond) {
		err := c.Down()
		if err == nil {
			break
		}
		if !control.Locked(path) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: end its process, then 'viasocks down' again", err)
		}
	}
	return c.Wait(downTimeout)
}

// opensAfter decides for ExecStopPost of systemd.service(5): a service that failed is undone if it may fail open. One that
// was stopped has done itself what it should.
func opensAfter(cfg *config.Config, environ []string) bool {
	for _, e := range environ {
		if result, ok := strings.CutPrefix(e, "SERVICE_RESULT="); ok {
			return result != "success" && cfg.Host.FailOpen
		}
	}
	return false
}

// Shut closes the host as Up does, and ends: nothing but what Up lets pass leaves until Up or Down. The TUN stays, so that
// answers to connections from outside find their way.
func Shut(cfg *config.Config, stderr *os.File) error {
	e, err := newEnv(cfg, stderr)
	if err != nil {
		return err
	}
	defer e.close()
	e.warn(cfg)
	_, lock, err := alone(cfg)
	if err != nil {
		return err
	}
	defer lock.Close()
	closed := *cfg
	closed.Host.FailOpen = false // nobody has failed: it is closed until somebody says otherwise
	h, err := newHost(&closed, nil, nil, e.log)
	if err != nil {
		return err
	}
	defer h.Close()
	err = h.Shut()
	if err == nil {
		var dev tun.Device
		if dev, _, err = openTUN(cfg, e, true, nil); err == nil {
			defer dev.Close()
			err = h.Steer()
		}
	}
	if err != nil && !h.Recovered() {
		err = errors.Join(err, h.Unsteer(), h.Open())
	}
	return err
}

// DryRun writes every line that Up would do to the host.
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
		plan = append(plan, fmt.Sprintf("resolvectl dns %s %s", cfg.TUN, nameserver), fmt.Sprintf("resolvectl domain %s '~.'", cfg.TUN))
	}
	for _, l := range plan {
		if _, err := fmt.Fprintln(out, control.Plain(l)); err != nil {
			return err
		}
	}
	return nil
}
