package daemon

import (
	"errors"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// lingers is how long a removed proxy may still be written to, so that the resets of its connections reach it.
const lingers = 2 * time.Second

// reload reads the configuration again and applies what can change while running. If it has an error, nothing
// changes.
func (u *up) reload() {
	if u.waitsFor() == nil { // otherwise it has not been ready yet
		u.notify.Reloading()
		defer func() { u.notify.Ready("carries the host through " + proxyName(u.config())) }()
	}
	cfg, err := u.Again()
	if err == nil {
		err = u.take(cfg)
	}
	if err != nil {
		u.log.Error("the configuration is unchanged", "err", config.Redact(err.Error()))
		return
	}
	for _, c := range changes(u.config(), cfg) {
		u.log.Info("reload: " + config.Redact(c))
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

// take applies cfg, or changes nothing.
func (u *up) take(cfg *config.Config) (err error) {
	old := u.config()
	u.mu.Lock()
	warned := u.warnings
	u.warnings = nil
	u.mu.Unlock()
	defer func() {
		if err != nil {
			u.mu.Lock()
			u.warnings = warned
			u.mu.Unlock()
		}
	}()
	if err := u.checkProxies(cfg); err != nil {
		return err
	}
	if err := poolIsFree(cfg, net.InterfaceAddrs); err != nil {
		return err
	}
	next := u.excludeLocal(cfg)
	*cfg = *next
	// Both the old and the new proxies may be reached while one replaces the other.
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
	u.teller.Want(tellsResolved(cfg))
	u.checkNames(cfg)
	for _, w := range cfg.Warnings {
		u.log.Warn(w) // status takes them from cfg
	}
	if len(cfg.NeedRestart) > 0 {
		u.warning("changed in the file, and taken at the next start only: " + strings.Join(cfg.NeedRestart, ", "))
	}
	u.level.Set(cfg.LogLevel)
	return nil
}

// change applies the differences between two configurations to the host.
func (u *up) change(from, to *config.Config) error {
	next := kernelConfig(to, u.log)
	if u.host == nil || reflect.DeepEqual(kernelConfig(from, u.log), next) {
		return nil
	}
	return u.host.Change(next)
}

// warning logs a warning that status also shows.
func (u *up) warning(text string) {
	u.log.Warn(text)
	u.mu.Lock()
	defer u.mu.Unlock()
	if !slices.Contains(u.warnings, text) {
		u.warnings = append(u.warnings, text)
	}
}
