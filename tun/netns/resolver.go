package netns

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const resolvConf = "/etc/resolv.conf"

// nsswitchConfs are the paths at which C libraries look for nsswitch.conf. The second is that of systems whose /etc
// contains only what the administrator has changed.
var nsswitchConfs = []string{"/etc/nsswitch.conf", "/usr/etc/nsswitch.conf"}

// resolverPaths are the sockets, or the directories of sockets, through which the host's resolvers answer. They have
// paths in the file system, so a network namespace does not cut them off. They are used by glibc before it reads
// nsswitch.conf (nscd), by nss-resolve (systemd-resolved), by nss-mdns (avahi), and by programs with the library of
// Apple's mDNSResponder.
//
// The socket of D-Bus stays, because desktops need it for much else. The C library does not use it for names if
// nsswitch.conf names no module that does.
var resolverPaths = []string{"/run/systemd/resolve", "/run/nscd", "/var/run/nscd", "/run/avahi-daemon", "/run/mdnsd"}

// setResolver hides the host's resolvers and gives the program an nsswitch.conf that names none of them, and a
// resolv.conf with these servers. If there are no servers, the program keeps the host's resolv.conf.
func setResolver(servers []netip.Addr, search []string, dotsAsIs bool) error {
	target, err := resolveLink(resolvConf)
	if err != nil {
		return fmt.Errorf("cannot set the program's resolver: %w", err)
	}
	content := resolvContent(servers, search, dotsAsIs, readSome(target)) // before a mask hides it
	masked, err := hideResolvers()
	if err != nil {
		return err
	}
	for _, conf := range nsswitchConfs {
		if err := setNsswitch(conf); err != nil {
			return fmt.Errorf("cannot set the program's resolver (%s): %w", conf, err)
		}
	}
	if len(servers) == 0 {
		return nil
	}
	if contains(masked, target) {
		err = writeFile(target, content)
	} else {
		err = bindContent(target, 0, content)
	}
	if errors.Is(err, unix.ENOENT) && isLink(resolvConf) {
		// It is a link to a file that does not exist, as when systemd-resolved is not running. The link itself is
		// covered then, because the file cannot be created without writing to the host.
		err = bindContent(resolvConf, unix.O_NOFOLLOW, content)
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot set the program's resolver: %s does not exist: make it, an empty file will do", target)
	}
	if err != nil {
		return fmt.Errorf("cannot set the program's resolver (%s): %w", target, err)
	}
	return nil
}

// hideResolvers covers the paths of resolverPaths and returns the directories.
func hideResolvers() (masked []string, err error) {
	for _, path := range resolverPaths {
		real, err := filepath.EvalSymlinks(path)
		if err != nil || contains(masked, real) {
			continue
		}
		if st, serr := os.Stat(real); serr == nil && !st.IsDir() {
			err = bindContent(real, 0, "") // connect(2) to an empty file is refused
		} else if err = unix.Mount("tmpfs", real, "tmpfs", plainMount, "size=64k,mode=0755"); err == nil {
			masked = append(masked, real)
		}
		if err != nil {
			return masked, fmt.Errorf("cannot hide %s from the program: %w", path, err)
		}
	}
	return masked, nil
}

// setNsswitch covers an nsswitch.conf that names sources of host names other than files and DNS. If there is none, or
// the program cannot read it, a C library uses these two.
func setNsswitch(path string) error {
	target, err := resolveLink(path)
	if err != nil {
		return nil // a loop of links, which nothing can read
	}
	old := readSome(target)
	content := nsswitchContent(old)
	if content == old {
		return nil
	}
	return bindContent(target, 0, content)
}

// nsswitchContent returns old with a hosts line that names only sources which contact no process of the host: files,
// DNS, and myhostname, which knows the name of this host and its addresses. Others, such as resolve, mdns, sss,
// mymachines and wins, contact a process through a socket. An action in brackets belongs to the source before it.
func nsswitchContent(old string) string {
	var b strings.Builder
	for line := range strings.Lines(old) {
		rule, _, _ := strings.Cut(line, "#")
		database, sources, ok := strings.Cut(rule, ":")
		if !ok || strings.TrimSpace(database) != "hosts" {
			b.WriteString(line)
			continue
		}
		if kept, dropped := hostSources(sources); dropped {
			line = "hosts: " + strings.Join(kept, " ") + "\n"
		}
		b.WriteString(line)
	}
	return b.String()
}

// hostSources returns the sources of a hosts line that contact no process of the host. A dropped source is replaced
// by DNS and, if it also reads /etc/hosts, by files.
func hostSources(sources string) (kept []string, dropped bool) {
	keep, readsHosts := true, false
	// An action may contain spaces: [NOTFOUND=return SUCCESS=continue].
	for _, f := range splitSources(sources) {
		switch {
		case strings.HasPrefix(f, "["):
		case f == "files", f == "dns", f == "db", f == "myhostname":
			keep = true
		default:
			keep, dropped = false, true
			readsHosts = readsHosts || f == "resolve"
		}
		if keep {
			kept = append(kept, f)
		}
	}
	if readsHosts && !slices.Contains(kept, "files") {
		kept = slices.Insert(kept, 0, "files")
	}
	if dropped && !slices.Contains(kept, "dns") {
		kept = append(kept, "dns")
	}
	return kept, dropped
}

// splitSources splits a line of nsswitch.conf into sources and actions. An action is one word including its brackets.
func splitSources(s string) (words []string) {
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimSpace(s) {
		n := strings.IndexAny(s, " \t\r\n[")
		if s[0] == '[' {
			n = strings.IndexByte(s, ']') + 1
		}
		if n <= 0 {
			n = len(s)
		}
		words = append(words, strings.Join(strings.Fields(s[:n]), " "))
		s = s[n:]
	}
	return words
}

// resolveLink follows path to the file that an open would reach or create, even if that file does not exist.
func resolveLink(path string) (string, error) {
	for range 40 { // the kernel's own limit
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return path, nil // opening it reports the error
		}
		path = filepath.Join(dir, filepath.Base(path))
		link, err := os.Readlink(path)
		if err != nil {
			return path, nil // not a link, or missing
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(dir, link)
		}
		path = link
	}
	return "", fmt.Errorf("%s: %w", path, unix.ELOOP)
}

// readSome reads a file of limited size. A missing or unreadable file counts as empty.
func readSome(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return string(b)
}

// resolvContent returns a resolv.conf with servers that keeps the search list, the sortlist and the options of old,
// so that short names keep their meaning. It drops the option trust-ad, which is about a server that is no longer
// used. A non-nil search replaces the search list, and dotsAsIs drops the option ndots.
func resolvContent(servers []netip.Addr, search []string, dotsAsIs bool, old string) string {
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if search != nil {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	for line := range strings.SplitSeq(old, "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "search", "domain", "sortlist":
			if search != nil && f[0] != "sortlist" {
				continue
			}
			b.WriteString(strings.Join(f, " ") + "\n")
		case "options":
			var kept []string
			for _, o := range f {
				if o != "trust-ad" && !(dotsAsIs && strings.HasPrefix(o, "ndots:")) {
					kept = append(kept, o)
				}
			}
			if len(kept) > 1 {
				b.WriteString(strings.Join(kept, " ") + "\n")
			}
		}
	}
	return b.String()
}
