package informer

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestAKeyWaitsOnceAndComesAgainWhenItChangesInBetween(t *testing.T) {
	queue := NewQueue[string]()
	for range 3 {
		queue.Add("a")
	}
	queue.Add("b")
	if queue.Len() != 2 {
		t.Errorf("%d wait", queue.Len())
	}
	first, _ := queue.Get(t.Context())
	queue.Add("a") // while it is worked on
	second, _ := queue.Get(t.Context())
	if first != "a" || second != "b" || queue.Len() != 0 {
		t.Error(first, second, queue.Len())
	}
	queue.Done("a")
	queue.Done("b")
	if again, _ := queue.Get(t.Context()); again != "a" || queue.Len() != 0 {
		t.Error(again)
	}
	queue.Done("a")
	if queue.Len() != 0 {
		t.Error("it comes for ever")
	}
}

func TestGetEndsWithItsContextAndWithTheQueue(t *testing.T) {
	queue := NewQueue[int]()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan bool)
	go func() {
		_, ok := queue.Get(ctx)
		ended <- ok
	}()
	cancel()
	if <-ended {
		t.Error("it got something")
	}
	go func() {
		_, ok := queue.Get(t.Context())
		ended <- ok
	}()
	queue.Close()
	if <-ended {
		t.Error("it got something")
	}
	queue.Add(1)
	queue.AddAfter(1, time.Millisecond)
	if _, ok := queue.Get(t.Context()); ok {
		t.Error("a closed queue gives")
	}
}

func TestPausesGrowWithEachFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		queue := NewQueue[string](Backoff(time.Second, 5*time.Second))
		var at []time.Duration
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		queue.Add("a")
		queue.Run(ctx, 2, func(context.Context, string) error {
			at = append(at, time.Since(start))
			switch len(at) {
			case 5:
				queue.AddAfter("a", time.Minute) // later than what is set next
				queue.AddAfter("a", time.Second)
				return nil
			case 6:
				cancel()
			}
			return errors.New("not yet")
		})
		wanted := []time.Duration{0, 1, 3, 7, 12, 13}
		for index := range wanted {
			if at[index] != wanted[index]*time.Second {
				t.Errorf("%v", at)
				break
			}
		}
		queue.Close()
	})
}

func TestNoTwoWorkersHaveOneKey(t *testing.T) {
	queue := NewQueue[int]()
	var busy [4]atomic.Int32
	var done atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		queue.Run(ctx, 8, func(_ context.Context, key int) error {
			if busy[key].Add(1) != 1 {
				t.Error("two workers have one key")
			}
			time.Sleep(100 * time.Microsecond)
			busy[key].Add(-1)
			if done.Add(1) == 200 {
				cancel()
			}
			return nil
		})
	})
	for number := 0; ctx.Err() == nil; number++ {
		queue.Add(number % 4)
		time.Sleep(10 * time.Microsecond)
	}
	group.Wait()
}
