package e2e

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// The agent is the captured program. It serves one request a datagram: {family, type, 0} is answered by a socket of
// the agent's namespace. It ends when the test closes its end.

func agentMain(path string) int {
	if n := os.Getenv(envRetries); n != "" {
		_ = os.WriteFile("/proc/sys/net/ipv4/tcp_syn_retries", []byte(n), 0o644)
	}
	if n := os.Getenv(envFinTimeout); n != "" {
		_ = os.WriteFile("/proc/sys/net/ipv4/tcp_fin_timeout", []byte(n), 0o644)
	}
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		return 1
	}
	defer c.Close()
	conn := c.(*net.UnixConn)
	req := make([]byte, 8)
	for {
		n, err := conn.Read(req)
		if err != nil || n < 2 {
			return 0
		}
		fd, err := unix.Socket(int(req[0]), int(req[1])|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			return 1
		}
		_, _, err = conn.WriteMsgUnix([]byte{1}, unix.UnixRights(fd), nil)
		unix.Close(fd)
		if err != nil {
			return 1
		}
	}
}
