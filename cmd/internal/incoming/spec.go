package incoming

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Spec is a port of the program at which peers shall reach it.
type Spec struct {
	Port     uint16 // 0: those that the program asks for, see Auto
	Upstream string // empty: the default
}

// String returns the Spec in the form that Parse takes.
func (s Spec) String() string {
	text := strconv.Itoa(int(s.Port))
	if s.Auto() {
		text = auto
	}
	if s.Upstream != "" {
		text += "=" + s.Upstream
	}
	return text
}

// auto stands for the ports that programs ask for.
const auto = "auto"

// Auto reports whether s stands for the ports that the program asks its gateway for.
func (s Spec) Auto() bool { return s.Port == 0 }

// Parse parses PORT[/tcp][=UPSTREAM] and auto[=UPSTREAM].
func Parse(text string) (Spec, error) {
	port, up, named := strings.Cut(text, "=")
	if named && up == "" {
		return Spec{}, errors.New("the name of the upstream is missing")
	}
	if port == auto {
		return Spec{Upstream: up}, nil
	}
	number, proto, has := strings.Cut(port, "/")
	switch {
	case has && proto == "udp":
		return Spec{}, errors.New("UDP needs no --listen: datagrams of unknown senders are delivered anyway")
	case has && proto != "tcp":
		return Spec{}, fmt.Errorf("%q is not tcp", proto)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return Spec{}, fmt.Errorf("%q is not a port: write a number from 1 to 65535", number)
	}
	return Spec{uint16(n), up}, nil
}
