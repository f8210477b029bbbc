package netns

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// isRoot reports whether namespaces can be made without a user namespace. Inside a container, uid 0 alone is not
// enough.
func isRoot() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	const need = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	return os.Geteuid() == 0 && data[0].Effective&need == need
}

// dropCapabilities drops all capabilities of the calling thread, and all ways to gain any by exec.
func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// startError explains why the namespaces could not be made, and what to do.
func startError(rootless bool, err error) error {
	if !rootless {
		hint := ""
		if errors.Is(err, unix.EPERM) {
			hint = ": in a container allow it unshare and mount (docker: --cap-add SYS_ADMIN --security-opt seccomp=unconfined)"
		}
		return fmt.Errorf("cannot make a network namespace: %w%s", err, hint)
	}
	return fmt.Errorf("cannot make a user namespace: %w%s", err, usernsHint(sysctlValue))
}

// usernsHint names the setting that forbids user namespaces. value reads a sysctl; it returns "" if that is missing.
func usernsHint(value func(key string) string) string {
	for _, s := range []struct{ key, off, on string }{
		{"user.max_user_namespaces", "0", "10000"},
		{"kernel.unprivileged_userns_clone", "0", "1"},
		{"kernel.apparmor_restrict_unprivileged_userns", "1", "0"},
	} {
		if value(s.key) == s.off {
			return fmt.Sprintf(": run 'sysctl -w %s=%s' as root, or run this as root", s.key, s.on)
		}
	}
	return ": run this as root, or in a container allow it user namespaces (seccomp)"
}

// restrictedHint is for hosts where a user namespace can be made but gives no privileges inside (Ubuntu's AppArmor).
func restrictedHint(rootless, denied bool) string {
	const key = "kernel.apparmor_restrict_unprivileged_userns"
	if rootless && denied && sysctlValue(key) == "1" {
		return fmt.Sprintf(": user namespaces are restricted here: run 'sysctl -w %s=0' as root, or run this as root", key)
	}
	return ""
}

func sysctlValue(key string) string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(key, ".", "/"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
