package control

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// A process counts as alive until it ends, whatever signals come meanwhile.
func TestAlive(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := Process{PID: cmd.Process.Pid, handle: os.NewFile(uintptr(fd), "pidfd")}
	defer p.handle.Close()
	stop, over := make(chan struct{}), make(chan struct{})
	go func() { // the runtime sends itself this signal
		defer close(over)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Kill(os.Getpid(), unix.SIGURG)
			}
		}
	}()
	dead := 0
	for range 200_000 {
		if !p.Alive() {
			dead++
		}
	}
	close(stop)
	<-over
	if dead > 0 {
		t.Errorf("it was taken for dead %d times", dead)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if p.Alive() {
		t.Error("it counts as alive after its end")
	}
}
