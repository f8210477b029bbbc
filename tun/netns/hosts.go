package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

const hostsFile = "/etc/hosts"

// HostEntry is a name that the program finds in its /etc/hosts.
type HostEntry struct {
	Name  string // empty: there is none
	Addrs []netip.Addr
}

// addHost covers /etc/hosts with a copy that has one more name. IPv6 addresses are left out without IPv6.
func addHost(e HostEntry, ipv6 bool) error {
	if e.Name == "" {
		return nil
	}
	target, err := resolveLink(hostsFile)
	if err == nil {
		err = bindContent(target, 0, hostsContent(readSome(target), e, ipv6))
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("cannot give the program the name %s: %s does not exist: make it, an empty file will do", e.Name,
			target)
	case err != nil:
		return fmt.Errorf("cannot give the program the name %s (%s): %w", e.Name, hostsFile, err)
	}
	return nil
}

// hostsContent returns old with e in front, because a C library takes the first entry of a name.
func hostsContent(old string, e HostEntry, ipv6 bool) string {
	var b strings.Builder
	for _, a := range e.Addrs {
		if a.Is4() || ipv6 {
			fmt.Fprintf(&b, "%s %s\n", a, e.Name)
		}
	}
	return b.String() + old
}
