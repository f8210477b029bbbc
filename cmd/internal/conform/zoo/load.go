package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// serve offers the files of a directory by HTTP, for the downloads of scripts/zoo-front.sh.
func serve(ctx context.Context, at, dir string) error {
	s := &http.Server{Addr: at, Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// answerWait is how long echo waits for answers after its last question.
const answerWait = 2 * time.Second

// echo asks the far end n times from one socket, one question each interval, and prints a line for each answer: the
// times of question and answer in milliseconds since 1970. In addition, it sends a datagram to poison.to every
// poison.every. At the end it prints the number of answers. An error of the socket (an ICMP error) concerns one
// question.
func echo(ctx context.Context, to netip.AddrPort, n int, interval time.Duration, poison poison) error {
	u, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	defer u.Close()
	answers := make(chan int)
	go func() { answers <- receive(u) }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	start, poisoned := time.Now(), 0
	for i := 0; i < n && ctx.Err() == nil; i++ {
		u.WriteToUDPAddrPort(fmt.Appendf(nil, "? %d 0 0 64\n", time.Now().UnixMilli()), to)
		if poison.to.IsValid() && time.Since(start) >= time.Duration(poisoned+1)*poison.every {
			poisoned++
			u.WriteToUDPAddrPort([]byte("cannot be sent"), poison.to)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	u.SetReadDeadline(time.Now().Add(answerWait))
	fmt.Printf("%d of %d answered beside %d that cannot be sent\n", <-answers, n, poisoned)
	return nil
}

// poison is a destination to which the server cannot send.
type poison struct {
	to    netip.AddrPort
	every time.Duration
}

// receive counts answers until the read deadline; one that comes twice counts once.
func receive(u *net.UDPConn) (n int) {
	b := make([]byte, 2048)
	seen := map[int64]bool{}
	for {
		k, err := u.Read(b)
		var late net.Error
		if errors.As(err, &late) && late.Timeout() {
			return n
		}
		var id int64
		if _, bad := fmt.Sscanf(string(b[:k]), "! %d ", &id); err != nil || bad != nil || seen[id] {
			continue
		}
		seen[id] = true
		n++
		fmt.Println(id, time.Now().UnixMilli())
	}
}
