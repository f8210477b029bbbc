package daemon

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// lingers is how long a proxy that is not configured any more may still be written to: the resets of its connections
// shall reach it.
const lingers = 2 * time.Second

// reload reads the configuration again and takes what can change while running. What is wrong changes nothing.
func (u *up) reload() {
	u.notify.reloading()
	defer u.notify.ready("carries the host through " + proxyName(u.config()))
	cfg, err := u.Again()
	if err == nil {
		err = u.take(cfg)
	}
	if err != nil {
		u.log.Error("the configuration stays as it was", "err", config.Redact(err.Error()))
		return
	}
	now := time.Now()
	u.mu.Lock()
	u.cfg, u.reloaded = cfg, &now
	u.mu.Unlock()
	u.log.Info("reloaded", "file", cfg.File, "proxy", proxyName(cfg))
}

func (u *up) config() *config.Config {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.cfg
}

func (u *up) take(cfg *config.Config) error {
	old := u.config()
	u.mu.Lock()
	u.warnings = nil
	u.mu.Unlock()
	if err := u.checkProxies(cfg); err != nil {
		return err
	}
	// Both the old and the new may be reached while one replaces the other.
	u.allowed.configure(slices.Concat(old.Upstreams, cfg.Upstreams))
	if err := u.change(old, cfg); err != nil {
		u.allowed.configure(old.Upstreams)
		return err
	}
	if err := u.plane.reload(cfg); err != nil {
		u.allowed.configure(old.Upstreams)
		return errors.Join(err, u.change(cfg, old))
	}
	time.AfterFunc(lingers, func() { u.allowed.configure(u.config().Upstreams) })
	for _, w := range cfg.Warnings {
		u.warning(w)
	}
	if names := needRestart(u.first, cfg); len(names) > 0 {
		u.warning("changed in the file, and taken at the next start only: " + strings.Join(names, ", "))
	}
	u.level.Set(cfg.LogLevel)
	return nil
}

// change does to the host what two configurations say differently.
func (u *up) change(from, to *config.Config) error {
	a, b := from.Host, to.Host
	if u.host == nil || a.LAN == b.LAN && a.Inbound == b.Inbound && a.Strict == b.Strict && hasDirect(from) == hasDirect(to) &&
		reflect.DeepEqual(a.Exclude, b.Exclude) && reflect.DeepEqual(a.Include, b.Include) {
		return nil
	}
	return u.host.Change(kernelConfig(to, u.log))
}

// warning logs what the status shows too.
func (u *up) warning(text string) {
	u.log.Warn(text)
	u.mu.Lock()
	defer u.mu.Unlock()
	if !slices.Contains(u.warnings, text) {
		u.warnings = append(u.warnings, text)
	}
}

// needRestart names the options that differ and that a reload does not take.
func needRestart(a, b *config.Config) (names []string) {
	for _, o := range []struct {
		name string
		same bool
	}{
		{"mtu", a.MTU == b.MTU},
		{"offload", a.Offload == b.Offload},
		{"tun", a.TUN == b.TUN},
		{"mark", a.Mark == b.Mark && a.Mask == b.Mask},
		{"priority", a.Host.Priority == b.Host.Priority},
		{"table", a.Table == b.Table},
		{"nft-table", a.Host.NFTable == b.Host.NFTable},
		{"confirm", a.Host.Confirm == b.Host.Confirm},
		{"fail-open", a.Host.FailOpen == b.Host.FailOpen},
		{"control-group", a.Host.ControlGroup == b.Host.ControlGroup},
		{"log-file", a.LogFile == b.LogFile},
	} {
		if !o.same {
			names = append(names, o.name)
		}
	}
	return names
}
