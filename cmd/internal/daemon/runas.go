package daemon

import (
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/tun/netns"
)

// userOf returns the user as whom the program runs; nil: the caller.
func userOf(cfg *config.Config) *netns.User {
	if cfg.RunAs == nil {
		return nil
	}
	return &netns.User{UID: cfg.RunAs.UID, GID: cfg.RunAs.GID, Groups: cfg.RunAs.Groups}
}

// userEnv returns the program's environment with the variables of its user, as su(1) sets them.
func userEnv(env []string, as *config.RunAs) []string {
	if as == nil {
		return env
	}
	var out []string
	for _, e := range env {
		switch name, _, _ := strings.Cut(e, "="); name {
		case "HOME", "SHELL", "USER", "LOGNAME", "XDG_RUNTIME_DIR":
		default:
			out = append(out, e)
		}
	}
	out = append(out, "HOME="+as.Home, "SHELL="+as.Shell)
	if as.Name != "" {
		out = append(out, "USER="+as.Name, "LOGNAME="+as.Name)
	}
	return out
}
